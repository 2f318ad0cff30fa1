"""A recording of one's own: twenty lines write it, five commands later there is a plan."""

from pathlib import Path

import numpy as np
import torch

from jepa_lightning import Planner, load
from jepa_lightning.cli import main

WRITE = """
import numpy as np
from points import Points

for number in range(120):
    env = Points()
    env.reset(seed=number)
    frames, actions, states = [env.render()], [], [env.state]
    for step in range(12):
        actions.append(env.np_random.uniform(-2, 2, 2))
        env.step(actions[-1])
        frames.append(env.render())
        states.append(env.state)
    np.savez(f"recording/{number:03d}.npz", frames=frames, actions=actions, states=np.array(states, np.float32))
"""


def test_twenty_lines_and_five_commands_lead_to_a_plan(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recording").mkdir()
    exec(WRITE, {})
    small = ["--model.encoder_widths", "[8,16,32]", "--model.latent_dim", "32", "--model.predictor_width", "128"]
    data = ["--data", "Trajectories", "--data.root", "recording", "--data.windows", "7", "--model", "DynamicsJEPA"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    run = [
        "--trainer.max_steps",
        "400",
        "--trainer.check_val_every_n_epoch",
        "50",
        "--trainer.default_root_dir",
        "runs/mine",
    ]
    learn = ["--model.horizon", "4", "--model.learning_rate", "2e-3", "--model.final_momentum", "0.998"]
    main(["fit", *data, *small, *learn, *run, *quiet, "--data.batch_size", "32"])
    main(["validate", "--ckpt_path", "runs/mine", *quiet])
    probe = ["--model.checkpoint", "runs/mine", *quiet]
    main(["fit", "--config", "probes/inverse", *probe, "--trainer.max_steps", "2"])
    main(
        ["fit", "--config", "probes/image_decoder", *probe, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    )
    main(["test", "--config", "probes/forecast", *probe, "--model.decoder", "runs/mine/image_decoder"])

    episodes = [np.load(path) for path in sorted(Path("recording").glob("*.npz"))[:40]]
    start, goal = (
        torch.stack([torch.from_numpy(episode["frames"][t]) for episode in episodes]).permute(0, 3, 1, 2).float() / 255
        for t in (0, 4)
    )
    plan = load("runs/mine").plan(start, goal, 4, Planner(num_samples=100, num_iterations=8, num_elites=10))
    places = np.stack([episode["states"][0] for episode in episodes])
    goals = np.stack([episode["states"][4] for episode in episodes])
    reached = places
    for action in plan.unbind(1):  # in [-1, 1], of limits that are found to be nearly 2
        reached = np.clip(reached + 0.15 * 2 * action.numpy(), -1, 1)
    before, after = (np.linalg.norm(at - goals, axis=1).mean() for at in (places, reached))
    assert after < 0.7 * before
