"""Target modes, auxiliary losses and encoders of the actuated pendulum, side by side in short runs.

    python benchmarks/modes.py [--steps 1000] [--encoders cnn mlp vit] [--auxiliary VICReg "DINO centering"]

Prints a Markdown table, a row as soon as its run has ended: linear R2 of held-out trajectories from the target encoder
(the lowest of sines and cosines, then both velocities), error of the embeddings 3 steps ahead over persistence and over
that under another trajectory's actions, RankMe (of 32), and whether the collapse alarm was on at the end. The first row of
an encoder is its random-initialization baseline. 32-pixel images, one seed.
"""

import argparse
import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer

from callbacks import CollapseAlarm
from datamodules import DoublePendulum
from jepa_lightning import PendulumJEPA

WIDTHS = {"cnn": (16, 32), "mlp": (256, 256), "vit": (64, 64, 64)}
AUXILIARY: dict[str, dict[str, Any]] = {
    "VICReg": {"regularizer_weights": {"curvature": 0.1}},
    "Barlow Twins": {"regularizer": "barlow_twins"},
    "SIGReg": {"regularizer": "sigreg"},
    "inverse dynamics": {"regularizer": None, "inverse_dynamics": 1.0},
    "VICReg, inverse dynamics": {"regularizer_weights": {"curvature": 0.1}, "inverse_dynamics": 1.0},
    "DINO centering": {"regularizer": "dino_centering"},
    "none": {"regularizer": None},
}


def run(
    data: DoublePendulum, encoder: str, mode: str, auxiliary: dict[str, Any], steps: int
) -> tuple[dict[str, float], bool]:
    """Validation figures after so many steps, and whether the alarm was on."""
    torch.manual_seed(0)
    model = PendulumJEPA(
        encoder=encoder,  # type: ignore[arg-type]
        encoder_widths=WIDTHS[encoder],
        image_size=32,
        history=3,
        action_dim=2,
        latent_dim=32,
        predictor_width=256,
        horizon=3,
        target_mode=mode,  # type: ignore[arg-type]
        learning_rate=2e-3,
        final_momentum=0.998,
        **auxiliary,
    )
    alarm = CollapseAlarm(grace_steps=min(200, steps))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max(1, steps),
        val_check_interval=max(1, steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=5.0,
        callbacks=[alarm],
        **quiet,
    )
    if steps:
        trainer.fit(model, data)
    else:
        trainer.validate(model, data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, bool(alarm.alarms)


def row(encoder: str, mode: str, auxiliary: str, figures: dict[str, float], alarm: bool) -> str:
    """A line of the table."""
    r2 = {name.removeprefix("val/linear_r2_"): value for name, value in figures.items() if "linear_r2" in name}
    angles = min(value for name, value in r2.items() if "theta" in name)
    return (
        f"| {encoder} | {mode} | {auxiliary} | {angles:.2f} | {r2['omega1']:.2f}, {r2['omega2']:.2f} | "
        f"{figures['val/persistence_ratio']:.2f} | {1 / figures['val/shuffled_over_true']:.2f} | "
        f"{figures['val/rankme']:.1f} | {'yes' if alarm else 'no'} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--encoders", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--auxiliary", nargs="+", choices=AUXILIARY, default=list(AUXILIARY))
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # the alarm's among them, which is a column
    print(
        "| encoder | target mode | auxiliary loss | angles, lowest R2 | R2 of velocities | error / persistence | "
        "error / with other actions | RankMe | alarm |\n| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |",
        flush=True,
    )
    data = DoublePendulum(
        size=10_000,
        sequence_length=60,
        clip_length=28,
        val_size=512,
        history=3,
        stride=5,
        torque_limits=(10.0, 5.0),
        image_size=32,
    )
    for encoder in arguments.encoders:
        figures, _ = run(data, encoder, "vjepa2", AUXILIARY["none"], 0)
        print(row(encoder, "-", "random initialization", figures, False), flush=True)
        for auxiliary in arguments.auxiliary:
            for mode in ("vjepa2", "default", "none") if auxiliary != "none" else ("vjepa2", "none"):  # "default" is refused
                figures, alarm = run(data, encoder, mode, AUXILIARY[auxiliary], arguments.steps)
                print(row(encoder, mode, auxiliary, figures, alarm), flush=True)
