"""Warnings with a remedy while a run trains: a student that drifts, a discriminator that gives no signal (Figure 5)."""

from afd_fast.errors import extra
from afd_fast.training.run import Metrics, Run

with extra("train"):
    from rich.console import Console
    from rich.markup import escape

WATCHED = 20  # iterations
PAIR_R = (0.01, 0.65)  # the healthy range of sigmoid(D(student) - D(teacher))
NORM_RATIO = (0.9, 1.1)  # and of ||v|| / ||v_ref||
AUTO_RANGE = 10.0  # discriminator.lr_auto stays within this factor of discriminator.lr


class Watch:
    """Call it with every iteration's metrics. With discriminator.lr_auto it applies the remedy: the discriminator's
    learning rate doubled or halved."""

    def __init__(self, run: Run, console: Console):
        self.run, self.console = run, console
        self.drift_logged = -WATCHED

    def __call__(self, metrics: Metrics) -> None:
        self._drift(metrics.get("velocity_norm_ratio", 1.0))
        if "pair_r" in metrics:
            self._signal(metrics["pair_r"])

    def _log(self, text: str) -> None:
        self.console.print(f"[yellow]iteration {self.run.state.step}:[/] {escape(text)}")

    def _drift(self, ratio: float) -> None:
        if NORM_RATIO[0] <= ratio <= NORM_RATIO[1] or self.run.state.step < self.drift_logged + WATCHED:
            return
        self.drift_logged = self.run.state.step
        self._log(
            f"the student's velocities are {ratio:.2f} times as long as the frozen student's: it drifts (blur, collapse); "
            "raise loss.ref_coef or lower update.lr"
        )

    def _signal(self, pair_r: float) -> None:
        state, config = self.run.state, self.run.config.discriminator
        seen = state.pair_r = [*state.pair_r, pair_r][-WATCHED:]
        r = sum(seen) / len(seen)
        if len(seen) < WATCHED or PAIR_R[0] <= r <= PAIR_R[1]:
            return
        if stale := r > PAIR_R[1]:
            what = "stale: raise discriminator.lr or discriminator.steps"
        else:
            what = "overpowering: lower discriminator.lr, raise discriminator.r1 or discriminator.instance_noise"
        if config.lr_auto:
            (group,) = state.disc_optimizer.param_groups
            low, high = config.lr / AUTO_RANGE, config.lr * AUTO_RANGE
            group["lr"] = min(max(group["lr"] * (2 if stale else 0.5), low), high)
            what = f"{what.partition(':')[0]}: discriminator.lr is now {group['lr']:.3g}"
        self._log(
            f"sigmoid(D(student) - D(teacher)) has been {r:.3f} over {WATCHED} iterations; the discriminator is {what}"
        )
        state.pair_r = []
