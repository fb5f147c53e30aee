"""What `task=` chooses between: the classes that conf/task names.

`jobs.execute` calls `execute`. Each class imports its work when it runs, so that composing a config stays
cheap.

`recorded` is whether a task leaves a record in the output folder, `tracked` whether the tracker copies it,
`makes_runs` whether it starts runs of its own (`search_options` has that one).
`ignores` are groups and keys of the command line that it does not read: `jobs.execute` says so where they
are set. `check` is called before a single job has a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, check_bool, check_choice, check_range, check_texts

# what only a model that generates has a use for
GENERATION = frozenset(
    {"cache_steps", "calibration", "compile", "attention", "offload", "device", "metrics", "quality_db"}
)
# parts of `int8` that are about more than the weights of a denoiser
INT8_OF_A_RUN = frozenset(
    {"int8.attention", "int8.attention_min_sqnr_db", "int8.controlnet", "int8.steps", "int8.vae"}
)
REPORT_FORMATS = ("html", "markdown", "latex", "csv")
# what says how a model becomes INT8
QUANTIZATION = frozenset({"model_type", "int8", "outlier", "rounding", "backend", "lora", "lora_dir", "clip"})

# of task=audit, the best first; `audit/grades.yaml` says what they mean
GRADES = ("A", "B", "U", "C", "D", "F")


@dataclass(frozen=True)
class Run:
    """Build a model, generate with it, measure."""

    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = True
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset({"sync"})

    def check(self, spec: RunSpec) -> None:
        """Refuse a device, a backend, offloading or a mode that is known not to work."""
        from int8run.tasks.start_checks import check_start

        check_start(spec)

    def execute(self, spec: RunSpec, job: Job) -> float | None:
        """Return the metric named by `metrics.objective`, for sweepers.

        Raises:
            ConfigError: after the run, when it was not measured although there is a baseline: its name was
                checked before, but which metrics a run has depends on its model and LoRAs.
        """
        from int8run.tasks.run import run

        metrics = run(spec, job).metrics
        objective = spec.metrics.objective
        if spec.metrics.baseline != "none" and objective not in metrics:
            choices = ", ".join(sorted(metrics))
            raise ConfigError(f"metrics.objective={objective} was not measured; choose from {choices}")
        return metrics.get(objective)


@dataclass(frozen=True)
class Inspect:
    """Describe a `.safetensors` file, a folder of them, a pipeline, an image of int8run or a prompt table.

    Args:
        path: None: list what the cache holds.
    """

    recorded: ClassVar[bool] = False
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = GENERATION | QUANTIZATION | {"sampler", "save", "sync"}

    path: str | None = None

    def check(self, spec: RunSpec) -> None:
        """Nothing is known before the file is looked at."""

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Print what a file is, or what the cache holds."""
        from int8run.checkpoints.declared_format import DeclaredFormat
        from int8run.report.console import print_lines
        from int8run.tasks.inspect_cache import inspect_cache
        from int8run.tasks.inspect_file import inspect_file
        from int8run.tasks.inspect_prompts import find_named_model, inspect_prompts, inspects_prompts
        from int8run.utils.paths import expand_path

        if not self.path:
            print_lines(inspect_cache(spec.cache), "task.path=<file.safetensors> looks at a file")
            return
        declared = DeclaredFormat(spec.model.quant_format, spec.model.sdnq)
        path = expand_path(str(self.path))
        if inspects_prompts(path):
            description = inspect_prompts(path, find_named_model(spec.model, job.overrides))
        else:
            description = inspect_file(str(self.path), declared)
        print_lines(description.to_table(), *description.list_commands())


@dataclass(frozen=True)
class Bench:
    """Time every backend on the model's own layer shapes, and keep the fastest ones for `backend=auto`.

    Args:
        rounds: timings of each backend, interleaved; the median counts.
        rows: that every layer sees; the model's configs are enough then. None: those of a step of the model.
    """

    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset(
        {
            "outlier",
            "rounding",
            "lora",
            "lora_dir",
            "cache_steps",
            "calibration",
            "compile",
            "metrics",
            "quality_db",
            "cache",
            "save",
            "sync",
            "int8.convolutions",
            *INT8_OF_A_RUN,
        }
    )

    rounds: int = 21
    rows: int | None = None

    def __post_init__(self) -> None:
        check_range("task.rounds", self.rounds, 1, 1000, whole=True)
        if self.rows is not None:
            check_range("task.rows", self.rows, 1, 2**31 - 1, whole=True)

    def check(self, spec: RunSpec) -> None:
        """Refuse a device, a backend, offloading or a mode that is known not to work."""
        from int8run.tasks.start_checks import check_start

        check_start(spec)

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Time the backends, print a table, write `bench.json`."""
        from int8run.tasks.benchmark import run_benchmark

        run_benchmark(spec, job, rounds=self.rounds, rows=self.rows)


@dataclass(frozen=True)
class Quantize:
    """Write a quantized checkpoint without running it or holding it in memory.

    Args:
        component: which denoiser, of a pipeline with several; a text encoder, which is written in the format
            of `clip=`; or `vae`.
    """

    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = GENERATION - {"quality_db"} | {
        "backend",
        "prompts",
        "sampler",
        "cache",
        "sync",
        *INT8_OF_A_RUN,
    }

    component: str | None = None

    def check(self, spec: RunSpec) -> None:
        """Nothing is known before the file is looked at."""

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Write the denoiser, the text encoder or the VAE that `component` names."""
        if str(self.component).startswith("text_encoder"):
            from int8run.tasks.quantize_text_encoder import quantize_text_encoder

            quantize_text_encoder(spec, job, str(self.component))
            return
        if self.component == "vae":
            from int8run.tasks.quantize_vae import quantize_vae_file

            quantize_vae_file(spec, job)
            return
        # a denoiser needs neither diffusers nor transformers, which take more memory than its layers
        from int8run.tasks.quantize_checkpoint import quantize_file

        quantize_file(spec, job, self.component)


@dataclass(frozen=True)
class Audit:
    """Grade a quantized file of anybody: what its numbers are, beside the float file it was made from.

    Args:
        path: of the file, or of the folder of one checkpoint.
        base: the float file; None: `model.location` where the command line names a model, else there is none.
        component: of the base, where it is a pipeline with several denoisers.
        min_grade: a worse grade ends the command with an exit code of its own.
    """

    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = (
        GENERATION | (QUANTIZATION - {"model_type"}) | {"prompts", "sampler", "cache", "save", "sync"}
    )

    path: str | None = None
    base: str | None = None
    component: str | None = None
    min_grade: str = "C"

    def __post_init__(self) -> None:
        check_choice("task.min_grade", self.min_grade, GRADES)

    def check(self, spec: RunSpec) -> None:
        """Refuse to grade nothing."""
        if not self.path:
            raise ConfigError("task=audit grades a quantized file; name it with task.path=<file.safetensors>")

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Write audit.json and audit.html, and print the grade and what is wrong.

        Raises:
            AuditError: for a grade that is worse than `min_grade`.
        """
        from int8run.tasks.audit import AuditRequest, run_audit

        request = AuditRequest(
            path=str(self.path), base=self.base, component=self.component, min_grade=self.min_grade
        )
        run_audit(spec, job, request)


@dataclass(frozen=True)
class Report:
    """Compare runs on one page, from their output folders.

    Args:
        path: a folder with runs in it, at any depth; None: `sync`, else the newest sweep below `multirun`.
        sweep: tag of a sweep in the tracker; its runs are downloaded into `path` first.
        votes: files that the blind comparison of this report saved; they are counted on the page.
        format: one of REPORT_FORMATS: the page, or its table of runs.
        atlas: results of other people and machines: their metrics.json, or folders of them. They become one
            table of models, recipes and devices in place of the comparison.
    """

    recorded: ClassVar[bool] = False
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = (
        GENERATION | QUANTIZATION | {"model", "prompts", "sampler", "cache", "save"}
    )

    path: str | None = None
    sweep: str | None = None
    votes: Sequence[str] = ()
    format: str = "html"
    atlas: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_texts("task.votes", self.votes, "votes.json")
        check_choice("task.format", self.format, REPORT_FORMATS)
        if self.votes and self.format != "html":
            raise ConfigError(
                f"task.format={self.format} has no place for task.votes, which are counted on the page; "
                "leave one of them out"
            )
        check_texts("task.atlas", self.atlas, "results/anna/metrics.json")
        if self.atlas and (self.votes or self.sweep is not None):
            raise ConfigError(
                "task.atlas shows results of several people, and task.votes and task.sweep are about one "
                "sweep; leave one of them out"
            )

    def check(self, spec: RunSpec) -> None:
        """Nothing is known before the runs are looked at."""

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Write the page or the table, and print where it is."""
        from int8run.tasks.report import ReportOutput, report_runs, write_result_atlas

        if self.atlas:
            write_result_atlas(self.atlas, self.path, self.format)
            return
        output = ReportOutput(format=self.format, votes=self.votes)
        report_runs(spec.tracker, self.path, self.sweep, spec.sync, output)


@dataclass(frozen=True)
class Publish:
    """Put a folder for the hub together from a checkpoint that int8run wrote, and upload it if asked.

    Args:
        path: the `.safetensors` file or the folder that `save=` wrote.
        repo: the repository: `owner/name`.
        folder: where the files are put together; None: `publish/<name>`.
        license: of the base; None: what the base says.
        upload: whether anything leaves this machine.
        private: whether a repository that is new is private.
    """

    recorded: ClassVar[bool] = False
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = (
        GENERATION | QUANTIZATION | {"model", "prompts", "sampler", "cache", "save", "sync"}
    )

    path: str | None = None
    repo: str | None = None
    folder: str | None = None
    license: str | None = None
    upload: bool = False
    private: bool = True

    def __post_init__(self) -> None:
        check_bool("task.upload", self.upload)
        check_bool("task.private", self.private)

    def check(self, spec: RunSpec) -> None:
        """Refuse a command that does not say what is published, and where."""
        if not self.path or not self.repo:
            raise ConfigError(
                "task=publish needs task.path=<file or folder that save= wrote> and task.repo=<owner/name>"
            )

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Put the folder together, and say what is uploaded or would be."""
        from int8run.tasks.publish import Publication, publish

        publication = Publication(
            path=str(self.path),
            repo=str(self.repo),
            folder=self.folder,
            license=self.license,
            upload=self.upload,
            private=self.private,
        )
        publish(publication)
