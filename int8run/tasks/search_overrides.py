"""The overrides of a search's runs: those of its command, the recipe's, and what trials generate."""

import re
from collections.abc import Mapping, Sequence

from int8run.config.prompt_argument import quote_text
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.generate.prompt_table import is_table
from int8run.search.parse_space import NOT_OF_A_RECIPE
from int8run.tracking.setting_names import split_override
from int8run.utils.paths import to_local_path

# of the search itself: no run of it has them
OF_THE_SEARCH = re.compile(r"task([.].*)?|quality_db|resume|save|sync|recipe")
# what says which prompts are generated; the calibration's take their place
PROMPTS = re.compile(r"prompts[.](prompts|path|hub|take|take_seed|seeds_per_prompt)([.].*)?|seed")
# no ingredient changes it, because trials are judged by it; a recipe has it, because layers are fitted to it
FITTED_TO = frozenset({"calibration"})
PLAIN = re.compile(r"[A-Za-z_][\w.-]*")


class SearchOverrides:
    """Makes the overrides of trials, of the confirmation and of the recipe.

    Args:
        spec: of the search command.
        given: its overrides.
        judge_by: whose prompts trials generate: `calibration` or `run`.
    """

    def __init__(self, spec: RunSpec, given: Sequence[str], judge_by: str):
        self.spec = spec
        self.given = [word for word in given if not OF_THE_SEARCH.fullmatch(split_override(word)[0])]
        self.judging: list[str] = []
        self.base = self.given
        if judge_by == "calibration":
            check_texts_alone(spec)
            self.base = [word for word in self.given if not PROMPTS.fullmatch(split_override(word)[0])]
            self.judging = list_calibration_prompts(spec)

    def make_trial(self, settings: Mapping[str, object], baseline: str | None = None) -> list[str]:
        """The overrides of a trial.

        Args:
            settings: of its recipe.
            baseline: `metrics.baseline`; None: that of the command.
        """
        more = [] if baseline is None else [f"metrics.baseline={baseline}"]
        return join_overrides(self.base, [*self.judging, *more, *format_settings(settings)])

    def make_confirmation(self, settings: Mapping[str, object]) -> list[str]:
        """The overrides of a run of a recipe with the prompts of the command."""
        return join_overrides(self.given, format_settings(settings))

    def list_overruled(self, settings: Mapping[str, object]) -> list[str]:
        """Overrides of the command that a recipe replaces by other values."""
        kept = join_overrides(self.given, format_settings(settings))
        return [word for word in self.given if word not in kept]

    def list_recipe(self, settings: Mapping[str, object]) -> list[str]:
        """The overrides that make a recipe, without what only says how runs are judged and kept."""
        chosen = join_overrides(self.given, format_settings(settings))
        left_out = NOT_OF_A_RECIPE - FITTED_TO
        return [word for word in chosen if split_override(word)[0].partition(".")[0] not in left_out]


def check_texts_alone(spec: RunSpec) -> None:
    """Raise ConfigError for prompts with inputs of their own: the calibration's texts have none."""
    path = spec.prompts.path
    if path and is_table(to_local_path(path)):
        raise ConfigError(
            f"prompts.path={path} has inputs for each prompt, which the calibration's prompts have not; "
            "let the trials be judged by its rows: task.judge_by=run"
        )


def list_calibration_prompts(spec: RunSpec) -> list[str]:
    """Overrides for the calibration's prompts with seeds behind those that methods are fitted to."""
    calibration = spec.calibration
    texts = ",".join(quote_text(prompt) for prompt in calibration.prompts)
    return [
        f"++prompts.prompts=[{texts}]",
        "++prompts.path=null",
        "++prompts.hub=null",
        "++prompts.take=null",
        "++prompts.seeds_per_prompt=1",
        f"seed={calibration.seed + len(calibration.prompts)}",
    ]


def join_overrides(base: Sequence[str], more: Sequence[str]) -> list[str]:
    """Overrides in which the later ones win: of an option that is chosen anew its settings go, too."""
    replaced = {split_override(word)[0] for word in more}
    kept = []
    for word in base:
        key = split_override(word)[0]
        parents = {key[:position] for position, letter in enumerate(key) if letter == "."}
        if key not in replaced and not parents & replaced:
            kept.append(word)
    return [*kept, *more]


def format_settings(settings: Mapping[str, object]) -> list[str]:
    """Settings as overrides."""
    return [f"{key}={format_value(value)}" for key, value in settings.items()]


def format_value(value: object) -> str:
    """A value in hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else quote_text(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return str(value)
