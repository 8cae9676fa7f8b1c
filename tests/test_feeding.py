"""Examples on their way to the devices: kept there or streamed in windows, they are the same, in the same order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdtp.data import Split, feeding
from jaxdtp.devices.parallel import make_mesh

MESH = make_mesh()
STORED = 60
IMAGES = stand_in.images(np.arange(STORED), (4, 3, 2))
LABELS = np.arange(STORED, dtype=np.int32)


@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(0, STORED - 1), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    windows_fit=st.integers(0, 12),
    first=st.integers(0, 3),
    data=st.data(),
)
def test_windows_hold_every_batch_in_order(rows, batch_size, windows_fit, first, data):
    """From the first batch asked for, with any budget, and with a last batch that isn't full."""
    split = Split(IMAGES, LABELS, np.array(rows))
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    first = min(first, (len(order) - 1) // batch_size)
    example_bytes = IMAGES[0].nbytes + 4
    (feed,) = feeding.open_feeds([split], [(0,)], MESH, batch_size, windows_fit * batch_size * example_bytes * 4 / 1e6)
    if feed.resident is None:
        assert feed.window == max(1, windows_fit)
        assert len(set(rows)) > 4 * windows_fit * batch_size
    seen, numbers = [], []
    for window in feeding.windows(feed, order, first):
        numbers += range(max(window.first, first), window.stop)
        chosen = np.asarray(window.order)[: window.examples]
        skipped = (numbers[0] - window.first) * batch_size if window.first < first else 0
        seen.append(tuple(np.asarray(array)[chosen][skipped:] for array in window.data))
    images, labels = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    expected = split.rows[order[first * batch_size :]]
    np.testing.assert_array_equal(images, IMAGES[expected])
    np.testing.assert_array_equal(labels, LABELS[expected])
    assert numbers == list(range(first, -(-len(order) // batch_size)))


FULL_SIZE = {"train": 1_281_167, "validation": 50_000}  # of ImageNet

RUN_FULL_SIZE = f"""
import json, sys
from pathlib import Path
import stand_in
from jaxdtp import data, main

builder = stand_in.builder(Path.cwd(), {FULL_SIZE!r}, (32, 32, 3), 1000)
data.tfds.open_builder = lambda config: builder
code, added = stand_in.anonymous_bytes_added(lambda: main.main(sys.argv))
print(json.dumps([code, added]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_imagenet32_at_full_size_on_a_small_host(tmp_path):
    """1,281,167 images, 3.9 GB: decoded, streamed, trained on and evaluated, with less than 6 GB of the process's own
    memory, most of it VGG's at batch 256."""
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    config = Path(__file__).parents[1] / "configs" / "imagenet32_vgg.py"
    options = {
        "num_epochs": 1,
        "steps_per_epoch": 3,
        "feedback.iterations": 2,
        "dataset.validation_fraction": 0.001,
        "dataset.cache_dir": tmp_path / "cache",
    }
    arguments = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-c", RUN_FULL_SIZE, f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments]
    try:
        result = subprocess.run(command, cwd=tmp_path, env=stand_in.environment(), capture_output=True, text=True)
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert result.returncode == 0, result.stderr
    assert "images streamed" in result.stdout
    assert "1279886 / 1281 / 50000 training / validation / test images" in result.stdout
    code, added = json.loads(result.stdout.splitlines()[-1])
    assert code == 0
    assert added < 6e9
    assert os.path.exists(tmp_path / "run" / "summary.json")
