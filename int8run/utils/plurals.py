"""Numbers with the word that they count."""


def count_noun(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`, `1 entry`, `0 entries`.

    Args:
        number: how many.
        noun: one of them, with an English plural by rule.
    """
    return f"{number} {noun if number == 1 else pluralize(noun)}"


def pluralize(noun: str) -> str:
    """The plural by rule: `layers`, `entries`, `keys`, `matrices`."""
    if noun.endswith("ix"):
        return f"{noun[:-2]}ices"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    if noun.endswith(("s", "sh", "ch", "x")):
        return f"{noun}es"
    return f"{noun}s"
