"""Arguments of the small runs that `faults.py` cuts: a model of each family."""

SYNTHETIC = ("--config", "configs/overlays/synthetic.yaml")
SMALL_IMAGES = (
    *("--data.size", "260", "--data.image_size", "16", "--data.batch_size", "8", "--model.image_size", "16"),
    *("--model.patch_size", "4", "--model.encoder_depth", "1", "--model.predictor_width", "24"),
    *("--model.predictor_depth", "1", "--trainer.max_epochs", "3"),
)
FAMILIES = {
    "pendulum": (
        *("--config", "configs/pendulum/coordinates.yaml", "--model.latent_dim", "8", "--model.encoder_widths", "[16]"),
        *("--model.predictor_width", "16", "--model.horizon", "4", "--data.size", "640", "--data.sequence_length", "10"),
        *("--data.clip_length", "8", "--data.val_size", "64", "--data.batch_size", "8", "--trainer.max_epochs", "4"),
        *("--trainer.max_steps", "-1", "--trainer.check_val_every_n_epoch", "1"),
    ),
    "worlds": (
        *("--config", "configs/worlds/pendulum.yaml", "--data.image_size", "16", "--model.encoder_widths", "[4]"),
        *("--data.collect.environment.id", "datamodules.pendulum_environment:DoublePendulum-v0"),
        *("--data.collect.episodes", "40", "--data.collect.steps", "30", "--data.collect.num_workers", "1"),
        *("--data.collect.environment.image_size", "16", "--data.batch_size", "4", "--model.latent_dim", "8"),
        *("--model.predictor_width", "16", "--trainer.max_epochs", "4", "--trainer.max_steps", "-1"),
        *("--trainer.check_val_every_n_epoch", "1"),
    ),
    "ijepa": ("--config", "configs/ijepa/cifar10_cpu.yaml", *SYNTHETIC, *SMALL_IMAGES),
    "iwm": ("--config", "configs/iwm/cifar10_cpu.yaml", *SYNTHETIC, *SMALL_IMAGES),
}
