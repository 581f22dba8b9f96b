"""Going over to another plan between two steps, so that nothing that packets have left out is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from efficient_dl.comm import Compressor, Plan


def go_over(
    compressor: Compressor, plan: Plan, everyone: Callable[[list[str]], Iterable[Sequence[str]]]
) -> None:
    """Follows a plan from the next step on; all ranks call it together, with the same one.

    Residuals stay where the new plan's packets take them along, as they do at another rate. The others wait, each until
    its parameter has a gradient to go out with, on all ranks in the same step.

    everyone: gathers a list of names from all ranks that decide together whether something waits. Of a gradient whose
    sums one rank keeps alone, that rank leaves nothing out.
    """
    compressor.follow(plan)
    residuals = compressor.residuals
    if residuals is not None:
        kept = {name for theirs in everyone(residuals.kept) for name in theirs}
        residuals.start_draining(each=True, keep=compressor.feeds_back, names=kept)
