"""The notebook runs from beginning to end, without a network, and was committed with what it shows."""

import base64
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def shown(notebook):
    """What its cells evaluate to, and its pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    results = [output["data"]["text/plain"] for output in outputs if output.output_type == "execute_result"]
    return results, [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_quickstart(monkeypatch):
    # Nothing listens there, so that every download fails.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("XLA_FLAGS")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    of_before, pictures_of_before = shown(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    results, pictures = shown(notebook)
    assert (len(of_before), len(pictures_of_before)) == (len(results), len(pictures)) == (5, 3)
    devices, accuracy, accuracies, divided, reduced = results
    assert devices.count("CpuDevice") == 2
    assert float(accuracy.strip("'").split("%")[0]) > 90
    assert min(eval(accuracies).values()) > 0.9
    assert float(divided) > 0.9
    assert eval(reduced)[0] == "float32"
    assert eval(reduced)[1] > 0.9
    for picture in (*pictures, *pictures_of_before):
        assert base64.b64decode(picture).startswith(b"\x89PNG")
