"""Lightning, Accelerate and transformers train with tw.optim.AdamW, as their users would write it.

`pip install --group integrations` brings them; `.ci/wheel` does.
"""

import copy
import functools

import pytest
import torch
from torch import nn

tw = pytest.importorskip("torchweld")

# What they warn of (workers, deprecations among themselves) is theirs.
pytestmark = pytest.mark.filterwarnings("default")

HYPER = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
# Layouts that must survive a checkpoint, all with clipping inside the step.
LAYOUTS = {
    "float32": {},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "int8 states": {"state_dtype": "int8"},
    "split": {"split_master": True},
    "stochastic": {"stochastic_rounding": True, "state_dtype": "int8"},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def clipping(layout):
    return functools.partial(tw.optim.AdamW, max_grad_norm=0.5, **LAYOUTS[layout])


def dtype_of(layout):
    return torch.bfloat16 if layout in ("split", "stochastic") else torch.float32


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def vectors(count=24):
    """Points and a linear function of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def assert_equal(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# --- Lightning ------------------------------------------------------------------------------------


def lightning_module(make):
    lightning = pytest.importorskip("lightning")

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.mse_loss(self.model(x), y)

        def configure_optimizers(self):
            optimizer = make(self.parameters(), **HYPER)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    torch.manual_seed(0)
    return Regression()


def fit(module, folder, ckpt_path=None, **options):
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(vectors(), batch_size=8)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}])
def test_lightning(tmp_path, options):
    ours, stock = lightning_module(tw.optim.AdamW), lightning_module(torch.optim.AdamW)
    start = copy.deepcopy(ours.state_dict())
    fit(ours, tmp_path, **options)
    fit(stock, tmp_path, **options)
    assert_equal(ours, stock)
    assert all(not torch.equal(p, start[name]) for name, p in ours.state_dict().items())


@layouts
def test_lightning_resumes(tmp_path, layout):
    precision = "bf16-true" if dtype_of(layout) == torch.bfloat16 else "32-true"
    whole, part, resumed = (lightning_module(clipping(layout)) for _ in range(3))
    fit(whole, tmp_path, max_epochs=3, precision=precision)
    one = fit(part, tmp_path, max_epochs=1, precision=precision)
    one.save_checkpoint(tmp_path / "one.ckpt")
    fit(
        resumed, tmp_path, max_epochs=3, ckpt_path=tmp_path / "one.ckpt", precision=precision
    )  # fmt: skip
    assert next(whole.parameters()).dtype == dtype_of(layout)
    assert_equal(resumed, whole)


def test_lightning_with_our_scaler(tmp_path):
    lightning = pytest.importorskip("lightning")
    module = lightning_module(functools.partial(tw.optim.AdamW, max_grad_norm=0.5))
    precision = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=tw.amp.GradScaler("cpu", init_scale=64.0)
    )
    trainer = fit(module, tmp_path, plugins=precision)
    norm = trainer.optimizers[0].grad_norm
    assert 0 < norm < torch.inf
    assert precision.scaler.get_scale() == 64.0


# --- Accelerate -----------------------------------------------------------------------------------


def accelerated(make, folder=None, dtype=torch.float32, clip=True, **options):
    """Train with gradients accumulated over two batches; save in the middle and go back to it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).to(dtype)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    optimizer = make(model.parameters(), **HYPER)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader(vectors(), batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    def epoch():
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype)))
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    epoch()
    if folder is not None:
        accelerator.save_state(folder)
        epoch()
        accelerator.load_state(folder)
    epoch()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("mixed", [None, "bf16"])
def test_accelerate(mixed):
    assert_equal(
        accelerated(tw.optim.AdamW, mixed_precision=mixed),
        accelerated(torch.optim.AdamW, mixed_precision=mixed),
    )


@layouts
def test_accelerate_goes_back_to_what_it_saved(tmp_path, layout):
    make, how = clipping(layout), {"dtype": dtype_of(layout), "clip": False}
    assert_equal(accelerated(make, tmp_path, **how), accelerated(make, **how))


# --- transformers ---------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(12) * (index % 3 + 1)) % 32
        return {"input_ids": ids, "labels": ids}


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def hugging_face(cls, folder, resume=None, dtype=torch.float32, options=None, **arguments):
    """Train by class and keyword arguments; the Trainer makes the groups and the optimizer."""
    transformers = pytest.importorskip("transformers")
    model = language_model().to(dtype)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, max_steps=6,
        save_steps=3, learning_rate=HYPER["lr"], report_to=[], disable_tqdm=True,
        logging_steps=2, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(cls, {**HYPER, **(options or {})}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses


def test_transformers(tmp_path):
    ours, losses = hugging_face(tw.optim.AdamW, tmp_path / "ours")
    theirs, _ = hugging_face(torch.optim.AdamW, tmp_path / "theirs")
    assert_equal(ours, theirs)
    assert losses[-1] < losses[0]


@layouts
def test_transformers_resumes(tmp_path, layout):
    how = {
        "dtype": dtype_of(layout),
        "options": {"max_grad_norm": 0.5, **LAYOUTS[layout]},
        "max_grad_norm": 0.0,  # the Trainer's own
    }
    whole, _ = hugging_face(tw.optim.AdamW, tmp_path, **how)
    resumed, _ = hugging_face(
        tw.optim.AdamW, tmp_path, resume=str(tmp_path / "checkpoint-3"), **how
    )
    assert_equal(resumed, whole)
