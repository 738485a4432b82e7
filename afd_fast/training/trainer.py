"""A run in a folder: collect the teacher's videos, train, judge, checkpoint; can be interrupted and resumed without loss.

A run folder holds its lock, config.json, environment.json, teacher.json (hashes of the teacher's videos), metrics.jsonl
(one row per iteration), evaluations.jsonl, notes.jsonl (what differs from a run left alone), tensorboard/, checkpoints/,
and at the end result.json, samples.safetensors and the trained student.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict, cast

from afd_fast.config import TrainConfig, to_dict
from afd_fast.discriminators.discriminator import Discriminator, check_discriminator
from afd_fast.errors import ConfigError, Interrupted, TrainingError, extra
from afd_fast.judges import Scores
from afd_fast.students.files import first_line
from afd_fast.students.student import Family, TrainedWeights, check_settings
from afd_fast.students.student import family as make_family
from afd_fast.teachers.dataset import TeacherVideos, check_prompts, collect
from afd_fast.teachers.mixed import MixedTeacher
from afd_fast.teachers.teacher import Teacher
from afd_fast.training import checkpoint
from afd_fast.training.distributed import Ranks, job
from afd_fast.training.evaluate import Evaluator
from afd_fast.training.journal import Journal
from afd_fast.training.lock import check_unused, locked
from afd_fast.training.loop import train_step
from afd_fast.training.progress import on_stop_signal, progress
from afd_fast.training.resume import check_teacher, reopen, restore
from afd_fast.training.run import Metrics, Run
from afd_fast.training.run_folder import (
    check_folder,
    environment,
    finished,
    folder_of,
    make_folder,
    read_rows,
    write_json,
)
from afd_fast.training.state import new_state
from afd_fast.training.teacher import batch_plan, teacher_of
from afd_fast.training.wandb_run import check_wandb
from afd_fast.training.watch import Watch

with extra("train"):
    from rich.console import Console
    from rich.markup import escape
    from safetensors import SafetensorError

NOTED = ("loss", "reward", "margin", "accuracy")  # shown at the progress bar


class RunResult(TypedDict):
    """The content of result.json: scores of the base student, the trained one and the teacher, and how they were made.
    teachers: of several, each with the numbers of its prompts and the student's first headline score on them. problems: videos left out. notes: what differs from a run left alone: environments, teachers, damage."""

    rows: dict[str, Scores]
    prompts: dict[str, int]
    clips_judged: int
    teachers: dict[str, dict[str, float]]
    problems: list[str]
    notes: list[str]
    seconds: float
    config: dict[str, Any]
    environment: dict[str, Any]


class Trainer:
    """One run in one folder. `train()` trains to the end. Only rank 0 evaluates, writes files and logs."""

    def __init__(self, run: Run, teacher: Teacher, out: Path, console: Console):
        self.run, self.out, self.console = run, out, console
        config, ranks = run.config, run.ranks
        self.shards = ranks.share(config.shards)
        self.plan = batch_plan(config)
        # the student runs only when it runs on every rank
        self.lockstep = ranks.split > 1 or (config.fsdp and ranks.world > 1)
        self.progress = progress(console)
        with self.progress:
            with ranks.lead_first():  # the others then find every video in the cache
                self.data: TeacherVideos = collect(
                    teacher, config.teacher_clips, config.codec_crf, self._track, config.teacher_prompts
                )
            check_prompts(teacher.name, self.data.train_prompts, self.plan)  # some may have been refused
            if isinstance(teacher, MixedTeacher):
                run.teachers = teacher.owner
            with ranks.led():
                self.evaluator = Evaluator(run, self.data, self._track)
        for done in list(self.progress.task_ids):
            self.progress.remove_task(done)
        for problem in self.data.problems:
            console.print(f"[yellow]left out:[/] {escape(problem)}")
        few = sum(len(self.data.videos[p]) < config.teacher_clips for p in self.data.train_prompts)
        if few:
            console.print(
                f"[yellow]fewer videos:[/] {few} of {len(self.data.train_prompts)} training prompts have fewer than "
                f"teacher_clips={config.teacher_clips}; what there is is used"
            )
        ranks.wait()  # a rank may take much longer than another to read the videos
        self.watch = Watch(run, console)
        self.journal = Journal(out, console, config, lead=ranks.lead)
        self._stop = False

    def _track(self, items: Sequence[Any], description: str) -> Iterable[Any]:
        task = self.progress.add_task(description, total=len(items))
        for item in items:
            yield item
            self.progress.advance(task)

    # -- the loop --------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = False, on_step: Callable[[Metrics], None] | None = None) -> RunResult | None:
        """Train to the end and return result.json's content (None on ranks other than 0). Interrupted after a saved
        stop."""
        try:
            return self._train(resume, on_step)
        except (OSError, SafetensorError) as error:
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            reason = getattr(error, "strerror", None) or first_line(error)
            raise TrainingError(
                f"iteration {self.run.state.step}: {where}{reason}; {checkpoint.standing(self.out / 'checkpoints')}. Free "
                f"some space, see that {self.out} can be written, and continue with --resume"
            ) from error

    def _train(self, resume: bool, on_step: Callable[[Metrics], None] | None) -> RunResult | None:
        state, elapsed = self.run.state, 0.0
        if resume:
            elapsed = restore(self.run, self.out, self._note)
            self.console.print(f"resuming after iteration {state.step}")
        with self.run.ranks.led():
            if self.run.ranks.lead:
                if resume:
                    reopen(self.out, self.run.config, self._note)
                check_teacher(self.out, self.data, self._note)
            self.journal.open(state.step)
        started = time.perf_counter() - elapsed
        try:
            with on_stop_signal(self._ask_to_stop), self.progress:
                self._complete_evaluations()
                self._iterate(started, on_step)
                return self._finish(time.perf_counter() - started)
        finally:
            self.journal.close()

    def _iterate(self, started: float, on_step: Callable[[Metrics], None] | None) -> None:
        config, state, ranks = self.run.config, self.run.state, self.run.ranks
        task = self.progress.add_task(config.name, total=config.iterations, completed=state.step)
        while state.step < config.iterations:
            metrics = train_step(self.run, self.data.batch(self.plan, state.step, self.shards))
            self._check(metrics)
            stop, last = ranks.any(self._stop), state.step == config.iterations
            self.watch(metrics)
            with ranks.led():
                row = self.journal.iteration(state.step - 1, time.perf_counter() - started, metrics)
                note = " ".join(f"{k} {metrics[k]:.2f}" for k in NOTED if k in metrics)
                self.progress.update(task, completed=state.step, note=note)
                if on_step and ranks.lead:
                    on_step(row)
            judge = state.step % config.evaluation.every == 0 or last
            save = state.step % config.checkpoint_every == 0 or last or stop
            if judge or save:
                self._check_weights()
            if judge:
                self._evaluate()
            if save:
                self._save(time.perf_counter() - started)
            if stop and not last:
                raise Interrupted(f"stopped after iteration {state.step}; continue with --resume")

    def _save(self, elapsed: float) -> None:
        state, folder, ranks = self.run.state, self.out / "checkpoints", self.run.ranks
        payload = {"state": state.state_dict(), "elapsed": elapsed}
        with ranks.led():
            self.journal.settle()
            if ranks.lead and not self.run.config.fsdp:
                checkpoint.save(folder, state.step, payload)
        if self.run.config.fsdp:
            checkpoint.save_sharded(folder, state.step, payload, ranks)

    def _note(self, text: str) -> None:
        self.journal.note(self.run.state.step, text)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        self.console.print("stopping after this iteration ...")

    def _check(self, metrics: Metrics) -> None:
        bad = [k for k, v in metrics.items() if not math.isfinite(v) and not k.startswith("health/")]
        if bad:
            raise TrainingError(
                f"iteration {self.run.state.step}: {', '.join(bad)} not finite; stopped before a checkpoint could be overwritten"
            )

    def _check_weights(self) -> None:
        """TrainingError, the same on every rank, before the judge or a checkpoint gets weights that are not finite."""
        name = self.run.state.not_finite()
        if self.run.ranks.any(name is not None):
            raise TrainingError(
                f"iteration {self.run.state.step}: {name or 'a tensor of another rank'} is not finite; not saved, "
                f"{checkpoint.standing(self.out / 'checkpoints')}. Start again with a lower update.lr (discriminator.lr, if it "
                "is the discriminator's)"
            )

    def _complete_evaluations(self) -> None:
        """Judge the base student of a new run; of a resumed one judge again what its rows lack for the result."""
        state, ranks, found = self.run.state, self.run.ranks, read_rows(self.journal.evaluations)
        steps = {row["step"] for row in found}
        if ranks.any(ranks.lead and state.step > 0 and 0 not in steps):
            self._note(f"{self.journal.evaluations.name} had lost the base student's row: judged again")
            self._evaluate(base=True)
        if ranks.any(ranks.lead and state.step in (0, self.run.config.iterations) and state.step not in steps):
            self._evaluate()

    def _evaluate(self, *, base: bool = False) -> None:
        with self.run.ranks.led():
            row = self.evaluator.evaluate(base=base) if self.run.ranks.lead or self.lockstep else {}
            if not self.run.ranks.lead:
                return
            self.journal.evaluation(row, self.evaluator.by_prompt, self.evaluator.sample, self.run.family.video.fps)
            values = {key: row[key] for key in self.evaluator.judge.headline if math.isfinite(row[key])}
            if "held_out_accuracy" in row:
                values["accuracy"] = row["held_out_accuracy"]  # of the discriminator, on held-out prompts
            shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
            self.console.print(f"iteration {int(row['step']):4d}: {shown}")

    def _finish(self, seconds: float) -> RunResult | None:
        """Judge the final student and the teacher, keep samples, weights and the result."""
        with self.run.ranks.led():
            if not (self.run.ranks.lead or self.lockstep):
                return None
            weights = self.evaluator.weights()
            self.evaluator.save_samples(self.out / "samples.safetensors")
            return self._result(weights, seconds) if self.run.ranks.lead else None

    def _by_teacher(self, by_prompt: Sequence[float]) -> dict[str, dict[str, float]]:
        owner, found = self.run.teachers, dict[str, dict[str, float]]()
        for spec in dict.fromkeys(owner.values()):
            scores = [score for prompt, score in zip(self.data.held_out, by_prompt) if owner[prompt] == spec]
            found[spec] = {"train": sum(owner[p] == spec for p in self.data.train_prompts), "held_out": len(scores)}
            if scores:
                found[spec][self.evaluator.judge.headline[0]] = sum(scores) / len(scores)
        return found

    def _result(self, weights: TrainedWeights, seconds: float) -> RunResult:
        config, evaluations = self.run.config, read_rows(self.journal.evaluations)
        held = len(self.data.held_out)
        rows = {"base": evaluations[0], "student": evaluations[-1], "teacher": self.evaluator.teacher_row()}
        rows = {name: {k: v for k, v in row.items() if k != "by_prompt"} for name, row in rows.items()}
        result = RunResult(
            rows=rows,
            prompts={"train": len(self.data.train_prompts), "held_out": held},
            clips_judged=held * config.evaluation.rollouts,
            teachers=self._by_teacher(evaluations[-1].get("by_prompt", [])),
            problems=self.data.problems,
            notes=[f"after iteration {row['step']}: {row['text']}" for row in read_rows(self.journal.notes)],
            seconds=seconds,
            config=to_dict(config),
            environment=environment(),
        )
        self.run.family.save(weights, to_dict(config), self.out)
        os.sync()  # weights and samples before the result that says they are there
        write_json(self.out / "result.json", result)
        return result


def new_run(
    config: TrainConfig,
    family: Family | None = None,
    discriminator: Discriminator | None = None,
    ranks: Ranks = Ranks(),
) -> Run:
    """The networks and optimisers of a run. family: in place of the one that config.student names. ConfigError for what
    does not fit together."""
    if family is None:
        family = make_family(config.student, chunk=config.rollout.chunk, seed=config.seed)
    elif any((config.student.base, config.student.frames, config.student.height, config.student.width)):
        raise ConfigError(
            "student.base, frames, height and width have no meaning with a family of your own: leave them out"
        )
    if family.chunk != config.rollout.chunk:
        raise ConfigError(f"rollout.chunk={config.rollout.chunk}, but the family's chunk is {family.chunk}")
    for key, value in family.student.sampler.items():
        if (here := getattr(config.rollout, key, None)) != value:
            logging.getLogger("afd_fast").warning(
                "the student's checkpoint says %s=%s, the run has rollout.%s=%s", key, value, key, here
            )
    check_settings(family.student, called_methods(config))
    if config.rollout.graphs and family.device.type != "cuda":
        raise ConfigError(f"rollout.graphs records CUDA graphs, and the student is on {family.device}: leave it out")
    if discriminator is not None:
        check_discriminator(discriminator)
    run = Run(config, new_state(config, family, discriminator), ranks)
    ranks.split_sequence(family.latents.height, family.latents.width, family.student, run.state.reference)
    return run


def called_methods(config: TrainConfig) -> dict[str, str]:
    """The optional methods of a student that a configuration calls, and the setting that asks for each."""
    called = {}
    if config.update.history != "detached":
        called[f"forward_{config.update.history}"] = f"update.history={config.update.history}"
    if config.rollout.graphs:
        called["graphed"] = "rollout.graphs=true"
    if config.fsdp:
        called["shard_plan"] = "fsdp=true"
    if config.sequence_parallel > 1:
        called["split_sequence"] = f"sequence_parallel={config.sequence_parallel}"
    return called


def train(
    config: TrainConfig,
    family: Family | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    overwrite: bool = False,
    teacher: Teacher | None = None,
    discriminator: Discriminator | None = None,
    console: Console | None = None,
) -> RunResult | None:
    """Train one run in the folder `out` (default runs/NAME) and return its result; None on ranks other than 0.

    Args:
        family: the student with its VAE and text encoder; None: the one `config.student` names.
        resume: continue the run in the folder; a finished one is returned as it is, or does the iterations that it lacks.
        overwrite: replace a finished or stopped run's folder.
        teacher, discriminator: in place of the ones that the configuration names.
        console: where progress goes; None: the terminal.

    Everything is checked before the folder is made and before the teacher is asked for a video. Under torchrun every
    process calls it. Raises ConfigError for what the user has to change, TeacherError, TrainingError and CheckpointError
    where a run stops, Interrupted after Ctrl-C or SIGTERM, once the run has saved itself.
    """
    folder = folder_of(config, out)
    with job() as ranks, contextlib.ExitStack() as held:
        ranks = ranks.together(config.sequence_parallel)
        ranks.share(config.shards)
        with ranks.lead_first():
            if ranks.lead:
                check_folder(folder, config, overwrite=overwrite, resume=resume)
                if resume:
                    held.enter_context(locked(folder))
                else:
                    check_unused(folder)
            if resume and (result := finished(folder, config)) is not None:
                return cast(RunResult, result) if ranks.lead else None
        console = console if console is not None and ranks.lead else Console(quiet=not ranks.lead)
        if config.logger == "wandb":
            check_wandb()
        run = new_run(config, family, discriminator, ranks)
        found = teacher_of(run, teacher, folder.parent / "teacher-cache")
        with ranks.lead_first():
            if ranks.lead and not resume:
                held.enter_context(locked(folder))
                check_folder(folder, config, overwrite=overwrite, resume=False)  # it may have changed meanwhile
                make_folder(folder, config)
        return Trainer(run, found, folder, console).train(resume=resume)
