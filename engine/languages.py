"""Which language a document is in, as far as an editor or a file name tells."""

from pathlib import PurePosixPath

# What a document counts as that has neither a name nor a language: what the starter was trained on.
# `language_of` assumes it only where its caller says so.
STARTER_LANGUAGE = "python"

# Identifiers of editors that differ from our names.
_ALIASES = {
    "c++": "cpp",
    "cuda-cpp": "cpp",
    "cs": "csharp",
    "golang": "go",
    "javascriptreact": "javascript",
    "js": "javascript",
    "json5": "jsonc",
    "jsx": "javascript",
    "make": "makefile",
    "md": "markdown",
    "py": "python",
    "python3": "python",
    "rs": "rust",
    "sh": "bash",
    "shell": "bash",
    "shellscript": "bash",
    "svg": "xml",
    "ts": "typescript",
    "typescriptreact": "tsx",
    "xhtml": "html",
    "xsl": "xml",
    "yml": "yaml",
}
_OF_SUFFIX = {
    ".atom": "xml",
    ".bash": "bash",
    ".c": "c",
    ".cc": "cpp",
    ".cjs": "javascript",
    ".cpp": "cpp",
    ".cs": "csharp",
    ".csproj": "xml",
    ".css": "css",
    ".cts": "typescript",
    ".cu": "cpp",
    ".cuh": "cpp",
    ".cxx": "cpp",
    ".go": "go",
    # C reads as C++ far better than C++ as C.
    ".h": "cpp",
    ".hh": "cpp",
    ".hpp": "cpp",
    ".htm": "html",
    ".html": "html",
    ".hxx": "cpp",
    ".ini": "ini",
    ".java": "java",
    ".js": "javascript",
    ".json": "json",
    ".json5": "jsonc",
    ".jsonc": "jsonc",
    ".jsx": "javascript",
    ".kt": "kotlin",
    ".kts": "kotlin",
    ".lua": "lua",
    ".markdown": "markdown",
    ".md": "markdown",
    ".mjs": "javascript",
    ".mk": "makefile",
    ".mts": "typescript",
    ".php": "php",
    ".pl": "perl",
    ".plist": "xml",
    ".props": "xml",
    ".py": "python",
    ".pyi": "python",
    ".pyw": "python",
    ".r": "r",
    ".rb": "ruby",
    ".resx": "xml",
    ".rs": "rust",
    ".rss": "xml",
    ".scala": "scala",
    ".sh": "bash",
    ".sql": "sql",
    ".swift": "swift",
    ".targets": "xml",
    ".toml": "toml",
    ".ts": "typescript",
    ".tsx": "tsx",
    ".svg": "xml",
    ".xhtml": "html",
    ".xlf": "xml",
    ".xml": "xml",
    ".xsd": "xml",
    ".xsl": "xml",
    ".xslt": "xml",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".zig": "zig",
}
_OF_NAME = {
    "cargo.lock": "toml",
    "dockerfile": "dockerfile",
    "gnumakefile": "makefile",
    "makefile": "makefile",
    "pipfile": "toml",
    "tsconfig.json": "jsonc",
    ".bashrc": "bash",
    ".profile": "bash",
}
_COMMENT_SIGNS = {
    "bash": "#",
    "c": "//",
    "cpp": "//",
    "csharp": "//",
    "dockerfile": "#",
    "go": "//",
    "ini": ";",
    "java": "//",
    "javascript": "//",
    "jsonc": "//",
    "kotlin": "//",
    "lua": "--",
    "makefile": "#",
    "perl": "#",
    "php": "//",
    "python": "#",
    "r": "#",
    "ruby": "#",
    "rust": "//",
    "scala": "//",
    "sql": "--",
    "swift": "//",
    "toml": "#",
    "tsx": "//",
    "typescript": "//",
    "yaml": "#",
    "zig": "//",
}
# Of no use for completing code: an editor says so when it does not know either.
_UNKNOWN = frozenset(("", "plaintext", "text", "unknown"))


def language_of(
    path: str | None, language: str | None, *, unnamed: str | None = None
) -> str | None:
    """Our name of a document's language, in lower case; None when it is unknown.

    Args:
        path: file name, with or without folders. language: identifier of the Language Server
            Protocol; it decides where it says anything. A name that we do not know is kept.
        unnamed: the answer for a document of which neither is told.
    """
    if path is None and language is None:
        return unnamed
    told = (language or "").strip().lower()
    if told not in _UNKNOWN:
        return _ALIASES.get(told, told)
    name = PurePosixPath((path or "").replace("\\", "/")).name.lower()
    return _OF_NAME.get(name) or _OF_SUFFIX.get(PurePosixPath(name).suffix)


def comment_sign(language: str | None) -> str | None:
    """What starts a comment that ends with its line; None where a language has no such sign.

    Args:
        language: as `language_of` names it.
    """
    return None if language is None else _COMMENT_SIGNS.get(language)
