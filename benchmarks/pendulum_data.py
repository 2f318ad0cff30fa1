"""Speed of the pendulum's physics and renderer, compared with plain references measured in the same run.

    python benchmarks/pendulum_data.py

The references are what one writes first: a Python loop over trajectories with a Runge-Kutta step on four floats, and a
drawing per frame with PIL. Each is timed on a fraction of the work and scaled up. Everything runs on one thread but the
training step, whose data share is measured on all of them.
"""

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from callbacks.ema import update_average
from datamodules import DoublePendulum
from datamodules.physics import FRAME_SECONDS, SUBSTEPS, Pendulum, sample_initial_states
from datamodules.rendering import MARGIN, render
from jepa_lightning import PendulumJEPA

TRAJECTORIES, FRAMES, SIZE = 10_000, 30, 64


def best_of(function: Callable[[], object], repeats: int = 5) -> float:
    """Minimum seconds of several calls: what the machine can do when nobody disturbs it."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def plain_derivative(t1: float, t2: float, w1: float, w2: float) -> tuple[float, float, float, float]:
    """The textbook's equations of motion for unit masses and lengths."""
    g, d = 9.81, t1 - t2
    denominator = 3 - math.cos(2 * d)
    a1 = -3 * g * math.sin(t1) - g * math.sin(t1 - 2 * t2) - 2 * math.sin(d) * (w2 * w2 + w1 * w1 * math.cos(d))
    a2 = 2 * math.sin(d) * (2 * w1 * w1 + 2 * g * math.cos(t1) + w2 * w2 * math.cos(d))
    return w1, w2, a1 / denominator, a2 / denominator


def plain_trajectory(state: list[float]) -> list[list[float]]:
    """One trajectory, step by step."""
    h = FRAME_SECONDS / SUBSTEPS
    frames = [state]
    for _ in range(FRAMES - 1):
        for _ in range(SUBSTEPS):
            k1 = plain_derivative(*state)
            k2 = plain_derivative(*[s + 0.5 * h * k for s, k in zip(state, k1, strict=True)])
            k3 = plain_derivative(*[s + 0.5 * h * k for s, k in zip(state, k2, strict=True)])
            k4 = plain_derivative(*[s + h * k for s, k in zip(state, k3, strict=True)])
            state = [s + h / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)]
        frames.append(state)
    return frames


def plain_image(t1: float, t2: float) -> np.ndarray:
    """One frame with PIL, in whole pixels."""
    scale = SIZE / (4 * MARGIN)
    x1, y1 = SIZE / 2 + scale * math.sin(t1), SIZE / 2 + scale * math.cos(t1)
    x2, y2 = x1 + scale * math.sin(t2), y1 + scale * math.cos(t2)
    image = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    draw.line([(SIZE / 2, SIZE / 2), (x1, y1), (x2, y2)], fill=255, width=2)
    for x, y in ((x1, y1), (x2, y2)):
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=255)
    return np.asarray(image, dtype=np.float32) / 255


def physics() -> torch.Tensor:
    """States of the whole data set against the loop."""
    initial = sample_initial_states(TRAJECTORIES, torch.Generator().manual_seed(0))
    pendulum = Pendulum()
    pendulum.simulate(initial[:10], 2, dtype=torch.float32)  # so that the code itself is in memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    states = pendulum.simulate(initial, FRAMES, dtype=torch.float32)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ours = best_of(lambda: pendulum.simulate(initial, FRAMES, dtype=torch.float32))
    part = initial[:50].tolist()
    plain = best_of(lambda: [plain_trajectory(state) for state in part], 3) * TRAJECTORIES / len(part)
    reference = torch.tensor([plain_trajectory(state) for state in part])
    assert (reference - states[:50]).abs().median() < 1e-4, "the reference computes something else"
    kept = states.numel() * states.element_size() / 1e6
    print(f"physics, {TRAJECTORIES} x {FRAMES} states, {SUBSTEPS} substeps, float64, one thread")
    print(f"  ours {ours:7.2f} s    kept {kept:.1f} MB (peak while computing +{peak:.0f} MB)")
    print(f"  loop {plain:7.2f} s    ratio {plain / ours:.0f}")
    return states


def rendering(states: torch.Tensor) -> None:
    """Microseconds per frame against PIL."""
    frames = states[:40].reshape(-1, 4)
    for size in (32, SIZE, 128):
        ours = best_of(lambda size=size: render(frames, size)) / len(frames)
        print(f"rendering, {size} px, one thread\n  ours {ours * 1e6:7.1f} us a frame")
        if size == SIZE:
            plain = best_of(lambda: [plain_image(*pair) for pair in frames[:500, :2].tolist()]) / 500
            print(f"  PIL  {plain * 1e6:7.1f} us a frame    ratio {plain / ours:.1f}")


def share_of_training(threads: int, config: str, clip_length: int, **model_arguments: Any) -> None:
    """What fraction of a training step the data takes: cutting the clips, drawing, stacking windows."""
    torch.set_num_threads(threads)
    data, model = DoublePendulum(clip_length=clip_length), PendulumJEPA(**model_arguments)
    parameters = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    preparing, training = [], []
    for clips in itertools.islice(data.train_dataloader(), 100):
        began = time.perf_counter()
        batch = data.observe(clips)
        drawn = time.perf_counter()
        pairs = model.target_pairs(batch)
        loss = model.prediction_loss(pairs) + model.regularizer(pairs.features)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        update_average(model.target_encoder, model.context_encoder, 0.99)
        preparing.append(drawn - began)
        training.append(time.perf_counter() - drawn)
    cutting = best_of(lambda: list(itertools.islice(data.train_dataloader(), 100))) / 100
    drawing, step = statistics.median(preparing), statistics.median(training)
    share = (cutting + drawing) / (cutting + drawing + step)
    print(f"one training step of {config}, {threads} threads, batch of {data.batch_size} clips of {clip_length} frames")
    print(
        f"  clips {cutting * 1e3:.2f} ms, drawing {drawing * 1e3:.1f} ms, model {step * 1e3:.1f} ms: data takes {share:.1%}"
    )


def main() -> None:
    """Print every figure next to its reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rendering(physics())
    share_of_training(threads, "configs/pendulum/demo.yaml", 10, horizon=6)
    share_of_training(threads, "configs/pendulum/images.yaml", 12, encoder_widths=(32, 64, 128))


if __name__ == "__main__":
    main()
