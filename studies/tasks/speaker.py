"""A task on Resemblyzer's speaker encoder (Wan et al. 2018): three LSTM layers, embeddings near the dense model's.

The weights are those in the PyPI wheel Resemblyzer (`pip install --no-deps Resemblyzer`): its file pretrained.pt is
read, tensors only, none of its code is run. Speech is not part of this project: see SPEECH_HELP.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt

RATE, WINDOW, HOP, MELS = 16_000, 400, 160, 40
FRAMES, EVERY = 160, 10  # of a partial utterance (1.6 s), and from the start of one to that of the next
LOUDNESS = 10 ** (-30 / 20)  # quieter speech is raised to it, as by Resemblyzer
SPEECH_HELP = (
    "put speech, .wav of 16 kHz, 16 bit, mono, one utterance a file, into the folder `speech` in RANKOPT_DATA; "
    "tests/install_models.sh unpacks what the PyPI source of pocketsphinx tests with (9 utterances, 39 s)"
)


# --- speech --------------------------------------------------------------------------------------


def speech_folder() -> Path:
    """The folder speech in RANKOPT_DATA, else in share/rankopt of this Python environment."""
    folders = [Path(os.environ.get("RANKOPT_DATA", ".")) / "speech", Path(sys.prefix) / "share" / "rankopt" / "speech"]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no speech in {' or '.join(map(str, folders))}: {SPEECH_HELP}")


def utterances() -> list[Tensor]:
    """Every utterance of at least one partial's length, samples in [-1, 1], in the order of their files' names."""
    found = []
    for path in sorted(speech_folder().rglob("*.wav")):
        try:
            with wave.open(str(path)) as file:
                form = (file.getframerate(), file.getsampwidth(), file.getnchannels())
                samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        except (wave.Error, EOFError, ValueError):
            continue  # pocketsphinx has damaged files, to test with
        if form == (RATE, 2, 1) and len(samples) >= FRAMES * HOP:
            x = torch.from_numpy(samples.astype(np.float32) / 2**15)
            found.append(x * max(1.0, LOUDNESS / x.square().mean().sqrt().clamp_min(1e-5).item()))
    if len(found) < 3:
        raise FileNotFoundError(f"fewer than 3 utterances of 1.6 s in {speech_folder()}: {SPEECH_HELP}")
    return found


def mel_filters() -> Tensor:
    """(MELS, WINDOW // 2 + 1): triangles of one area, even on the scale of Slaney (a logarithm above 1 kHz)."""
    step, log = 200 / 3, np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / log
    mels = np.linspace(0, top, MELS + 2)
    edges = np.where(mels < 15, mels * step, 1000 * np.exp(log * (mels - 15)))
    low, peak, high = (edges[i : i + MELS, None] for i in range(3))
    f = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    triangles = np.minimum((f - low) / (peak - low), (high - f) / (high - peak)).clip(0) * 2 / (high - low)
    return torch.from_numpy(triangles.astype(np.float32))


def mel_spectrogram(x: Tensor) -> Tensor:
    """Power in mel bands every 10 ms, not its logarithm: (samples,) -> (frames, MELS)."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(x, WINDOW, HOP, window=window, center=True, pad_mode="constant", return_complex=True)
    return (mel_filters() @ spectrum.abs().square()).T


def partials(found: list[Tensor]) -> Tensor:
    """Overlapping pieces of FRAMES frames, (n, FRAMES, MELS)."""
    return torch.cat([mel_spectrogram(x).unfold(0, FRAMES, EVERY).transpose(1, 2) for x in found]).contiguous()


# --- model and task ------------------------------------------------------------------------------


class SpeakerEncoder(nn.Module):
    """Mel frames (b, FRAMES, MELS) -> unit vectors (b, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(self.linear(hidden[-1]).relu(), dim=1)


def pretrained() -> SpeakerEncoder:
    """With the wheel's weights, in eval mode. Raises FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are not here: pip install --no-deps Resemblyzer==0.1.4")
    content = torch.load(Path(spec.origin).parent / "pretrained.pt", "cpu", weights_only=True)
    model = SpeakerEncoder()
    model.load_state_dict({k: v for k, v in content["model_state"].items() if k.startswith(("lstm.", "linear."))})
    return model.eval()


class Fidelity:
    """Mean cosine of a model's embeddings of some inputs to the dense model's."""

    def __init__(self, dense: nn.Module, x: Tensor) -> None:
        self.x = x
        with torch.inference_mode():
            self.wanted = dense(x)

    def __call__(self, model: nn.Module) -> float:
        with torch.inference_mode():
            return F.cosine_similarity(model(self.x), self.wanted).mean().item()


def speaker() -> rankopt.Task:
    """1,423,616 parameters. Of every three utterances two calibrate and the third scores."""
    model, found = pretrained(), utterances()
    calibration = partials([x for i, x in enumerate(found) if i % 3 != 2])
    near = Fidelity(model, calibration[:: max(1, len(calibration) // 64)])
    return rankopt.Task(
        model=model,
        example_input=calibration[:1],
        calibration=calibration.split(64),
        objective=lambda m: 1 - near(m),
        score=Fidelity(model, partials(found[2::3])),
    )
