"""Comments of programming languages, as far as a prompt needs them."""

from pathlib import PurePath

_STYLES: dict[tuple[str, str], str] = {
    ("#", ""): "python shellscript bash sh ruby perl r yaml toml makefile dockerfile elixir julia "
    "nix cmake powershell gdscript coffeescript crystal nim starlark graphql py pyi rb pl rake "
    "yml zsh fish ex exs jl ps1 mk bzl",
    ("//", ""): "javascript typescript javascriptreact typescriptreact java c cpp csharp go rust "
    "swift kotlin scala php dart zig groovy objective-c cuda-cpp solidity proto jsonc less scss "
    "js jsx mjs cjs ts tsx h hpp cc cxx hh cs rs kt kts m mm cu cuh sol",
    ("--", ""): "lua sql haskell ada elm vhdl hs adb ads vhd",
    ("%", ""): "latex tex erlang matlab prolog erl sty",
    (";", ""): "lisp clojure scheme racket asm ini commonlisp clj cljs el scm rkt s",
    ('"', ""): "vim",
    ("!", ""): "fortran fortran-modern f90 f95",
    ("/*", "*/"): "css",
    ("(*", "*)"): "ocaml pascal ml mli pas",
    ("<!--", "-->"): "html xml markdown vue svelte xhtml htm svg md",
}
_STYLE_OF = {name: style for style, names in _STYLES.items() for name in names.split()}


def as_comment(text: str, language: str | None, path: str | None, indent: str = "") -> str:
    """Text as comment lines, each with its line end.

    The language identifier decides, else the ending of the path; what neither knows gets `#`.
    """
    ending = PurePath(path).suffix.removeprefix(".").lower() if path else ""
    style = _STYLE_OF.get((language or "").lower()) or _STYLE_OF.get(ending) or ("#", "")
    opening, closing = style
    lines = []
    for line in text.split("\n"):
        # What would end the comment cannot stand in it.
        while closing and closing in line:
            line = line.replace(closing, "")
        lines.append(f"{indent}{opening} {line} {closing}".rstrip() + "\n")
    return "".join(lines)
