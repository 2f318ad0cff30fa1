"""The table of a `GoalProbe`."""

import math
from typing import Any

import numpy as np

TITLES = {
    "world_model": "world model, receding horizon (a new plan at each step)",
    "inverse": "goal-conditioned inverse model (no search)",
    "one_plan": "world model, open loop (the first plan to its end)",
    "replay": "the recorded actions",
    "zero": "zero actions",
    "random": "random actions",
    "untrained": "random-initialization baseline, receding horizon",
    "oracle": "oracle (the simulator itself), receding horizon, 32 samples",
}
"""Controller -> what it is."""


def goal_figures(rows: dict[str, list[Any]]) -> dict[str, float]:
    """Means over episodes, with the binomial standard error of the successes."""
    success = float(np.mean(rows["success"]))
    found = {
        "success": success,
        "standard_error": math.sqrt(success * (1 - success) / len(rows["success"])),
        "milliseconds_per_decision": 1000 * float(np.mean(rows["seconds"])),
    }
    if "last" in rows:  # means first: a start that happens to be at the goal has no ratio
        found["nearness"] = float(np.mean(rows["last"])) / max(float(np.mean(rows["first"])), 1e-12)
    return found


def goal_table(figures: dict[str, dict[str, Any]]) -> str:
    """Success and time of every controller, and how near the goal image is in the end, in Markdown."""
    near = "world_model" in figures and "nearness" in figures["world_model"]
    columns = ["reaching a goal", "success (standard error)", "ms a decision"]
    lines = ["| " + " | ".join(columns + (["embedding distance, last / first"] if near else [])) + " |"]
    lines.append("| :-- |" + " --: |" * (3 if near else 2))
    for name, title in TITLES.items():
        if name in figures:
            row = figures[name]
            cells = [title, f"{row['success']:.2f} ({row['standard_error']:.2f})", f"{row['milliseconds_per_decision']:.1f}"]
            lines.append("| " + " | ".join(cells + ([f"{row['nearness']:.2f}"] if near else [])) + " |")
    return "\n".join(lines)


def goal_notes(task: dict[str, Any], count: int) -> str:
    """What was asked for, in a few sentences, from the arguments of the probe and the number of episodes."""
    where = f"the goal `{task['goal_image']}`" if task["goal_image"] else f"goals {task['offset']} frames ahead"
    reached = "the environment ends the episode, whatever the goal image shows"
    if task["radius"] is not None:
        when = "at the last frame" if task["at_end"] else "at any frame"
        reached = f"within {task['radius']} of its state, {when}. None starts at its goal"
    return (
        f"{count} starts in held-out episodes, {where}, {task['budget']} frames to get there; reached: {reached}. "
        "Standard errors are binomial."
    )
