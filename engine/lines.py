"""Line ends: the model knows one, documents have three."""


def unix(text: str) -> str:
    """Text with the line end the model was trained on; CRLF and a lone CR become LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def line_end(text: str, at: int) -> str:
    """The line end in use where a fill goes: the last one before `at`, else the first after."""
    before = max(text.rfind("\n", 0, at), text.rfind("\r", 0, at))
    if before < 0:
        found = [place for end in "\r\n" if (place := text.find(end, at)) >= 0]
        before = min(found, default=-1)
    if before < 0 or (text[before] == "\n" and text[before - 1 : before] != "\r"):
        return "\n"
    if text[before] == "\r" and text[before + 1 : before + 2] != "\n":
        return "\r"
    return "\r\n"
