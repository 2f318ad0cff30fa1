"""The table of a `GoalProbe`."""

from typing import Any

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


def goal_table(figures: dict[str, dict[str, Any]]) -> str:
    """Success and time of every controller, in Markdown."""
    lines = ["| reaching a goal | success (standard error) | ms a decision |", "| :-- | --: | --: |"]
    for name, title in TITLES.items():
        if name in figures:
            row = figures[name]
            time = f"{row['milliseconds_per_decision']:.1f}"
            lines.append(f"| {title} | {row['success']:.2f} ({row['standard_error']:.2f}) | {time} |")
    return "\n".join(lines)
