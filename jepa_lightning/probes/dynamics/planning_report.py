"""The report of planning: figures of actions, and the tables.

Shapes: K steps ahead.
"""

from typing import Any

import torch
from torch import Tensor

from datamodules.physics import FRAME_SECONDS
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.rollouts import later_features, next_actions

CHUNK = 64
"""Trajectories that are rolled out at a time."""

RADII = (0.15, 0.25, 0.5)
"""Radii around the goal in meters. An episode succeeds if both bobs end within the second."""


def rollout_errors(
    jepa: PendulumJEPA, features: Tensor, actions: Tensor, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Mean squared errors 1 ... K steps ahead of roll-outs under the true actions, those of another trajectory and none.

    Args:
        jepa: An action-conditioned world model.
        features: Embeddings of trajectories, (N, T, D).
        actions: Their actions, (N, T - 1, A).
        steps: K.

    Returns:
        Kind of actions, or "still" for persistence -> (K,); kind -> actions (N, S, K, A); starting embeddings (N, S, D).
    """
    chosen = next_actions(actions, steps)  # (N, S, K, A)
    assert chosen is not None
    kinds = {"true": chosen, "shuffled": chosen.roll(1, dims=0), "zero": torch.zeros_like(chosen)}
    starts, truth = features[:, :-steps], later_features(features, steps)  # (N, S, D), (N, S, K, D)
    errors = {"still": (starts[:, :, None] - truth).square().mean(dim=(0, 1, 3))}
    for name, given in kinds.items():
        parts = zip(starts.split(CHUNK), given.split(CHUNK), truth.split(CHUNK), strict=True)
        squares = [(jepa.forecast(z, steps, a) - goal).square().sum(dim=(0, 1, 3)) for z, a, goal in parts]
        errors[name] = torch.stack(squares).sum(dim=0) / truth[..., 0, :].numel()
    return errors, kinds, starts


def action_figures(errors: dict[str, Tensor]) -> dict[str, Any]:
    """Sensitivity to actions, from errors (K,) under each kind of them and of persistence ("still")."""
    true = errors["true"]
    return {
        "steps": len(true),
        "shuffled_over_true": (errors["shuffled"][-1] / true[-1]).item(),
        "zero_over_true": (errors["zero"][-1] / true[-1]).item(),
        "true_over_shuffled": {str(k + 1): value for k, value in enumerate((true / errors["shuffled"]).tolist())},
        "true_over_persistence": {str(k + 1): value for k, value in enumerate((true / errors["still"]).tolist())},
    }


TITLES = {
    "success": "world model, receding horizon (a new plan at each window)",
    "one_plan": "world model, open loop (the first plan to its end)",
    "zero_torque": "zero torque",
    "random_torque": "random torque",
    "oracle": "oracle (known physics), open loop",
    "noisy_oracle": "oracle, open loop, from a noisy state (0.05 rad, 0.5 rad/s)",
    "noisy_oracle_replanning": "the same, receding horizon",
}


def planning_table(report: dict[str, Any]) -> str:
    """The figures of a `PlanningProbe` in Markdown."""
    planning, actions = report["planning"], report["actions"]
    errors = planning["standard_errors"] | {"success": planning["standard_error"]}
    lines = [
        "| reaching a goal | success (standard error) | " + " | ".join(f"within {radius} m" for radius in RADII) + " |",
        "| :-- | --: |" + " --: |" * len(RADII),
    ]
    for name, title in TITLES.items():
        rates = " | ".join(f"{rate:.2f}" for rate in planning["at_radius"][name].values())
        lines.append(f"| {title} | {planning[name]:.2f} ({errors[name]:.2f}) | {rates} |")
    swing = planning["swing_up_details"]
    lines += [
        "",
        f"| tip to ({', '.join(f'{place:g}' for place in swing['goal'])}) m, from hanging | success | zero torque | "
        "random torque | median of the highest tip, m | median of its minimum distance, m |",
        "| :-- | --: | --: | --: | --: | --: |",
        f"| {swing['episodes']} episodes | {planning['swing_up']:.2f} ({swing['standard_error']:.2f}) | "
        f"{swing['zero_torque']:.2f} | {swing['random_torque']:.2f} | {swing['median_highest']:.2f} | "
        f"{swing['median_nearest']:.2f} |",
        "",
        "| error of embeddings, steps ahead | 1 | 2 | 5 | 10 |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for key, title in (
        ("true_over_persistence", "under the true actions, over persistence"),
        ("true_over_shuffled", "under the true actions, over that under another trajectory's"),
    ):
        lines.append(f"| {title} | " + " | ".join(f"{actions[key][str(k)]:.3f}" for k in (1, 2, 5, 10)) + " |")
    return "\n".join(lines)


def planning_notes(probe: Any, reach_frames: int, swing_seconds: float) -> str:
    """What was asked of a `PlanningProbe`, in words."""
    return (
        f"Of `{probe.checkpoint}`, from {probe.jepa.observation}. Reaching: {probe.num_episodes} episodes, none of which "
        f"starts at its goal; success: both bobs within {RADII[1]} m of it {reach_frames} frames "
        f"({reach_frames * FRAME_SECONDS:g} s) ahead. Swing-up: {probe.num_swing_ups} episodes of {swing_seconds:g} s. "
        "Standard errors are binomial: 0 says only that all episodes went one way. All plans, the oracle's too, are "
        "made by the same search. Roll-outs: rollouts.png."
    )
