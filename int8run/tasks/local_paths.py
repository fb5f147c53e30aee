"""Paths of this machine in what goes to other people: cards, configs and pages name the file alone."""

import logging
import re

from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)

# a path of this machine with at least one folder before its name; backslashes of Windows are doubled in JSON
LOCAL_PATH = re.compile(
    r"(?<![\w/:.~-])(?:file:(?://(?:localhost)?)?/?)?(?:~?/|[A-Za-z]:[/\\]+)(?:[^/\s,\]}'\"`|\\]+[/\\]+)+(?P<name>[^/\s,\]}'\"`|\\]+)"
)


def hide_local_paths(text: str) -> str:
    """A text in which paths of this machine are their last part: nobody's folders become public."""
    shown, count = LOCAL_PATH.subn(lambda match: match["name"], text)
    if count:
        log.info("%s of this machine shortened to the name", count_noun(count, "path"))
    return shown
