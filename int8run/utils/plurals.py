"""Numbers with the word that they count."""

# a verb of several things -> the same of one
SINGULAR_VERBS = {"are": "is", "come": "comes", "have": "has", "reach": "reaches", "were": "was"}


def count_noun(number: int, noun: str, verb: str | None = None) -> str:
    """`1 thread`, `2 threads`, `1 entry`, `0 entries`; with a verb `1 layer is`, `2 layers are`.

    Args:
        number: how many.
        noun: one of them, with an English plural by rule.
        verb: of several, a key of SINGULAR_VERBS.
    """
    if number == 1:
        return f"1 {noun}" if verb is None else f"1 {noun} {SINGULAR_VERBS[verb]}"
    text = f"{number} {pluralize(noun)}"
    return text if verb is None else f"{text} {verb}"


def pluralize(noun: str) -> str:
    """The plural by rule: `layers`, `entries`, `keys`, `matrices`."""
    if noun.endswith("ix"):
        return f"{noun[:-2]}ices"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    if noun.endswith(("s", "sh", "ch", "x")):
        return f"{noun}es"
    return f"{noun}s"
