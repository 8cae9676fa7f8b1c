"""The notebook runs from beginning to end, without a network."""

import base64
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "dtp_quickstart.ipynb"


def test_quickstart(monkeypatch):
    # Nothing listens there, so that every download fails.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("XLA_FLAGS")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    results = [output["data"]["text/plain"] for output in outputs if output.output_type == "execute_result"]
    devices, accuracy, accuracies, divided = results
    assert devices.count("CpuDevice") == 2
    assert float(accuracy.strip("'").split("%")[0]) > 90
    assert min(eval(accuracies).values()) > 0.9
    assert float(divided) > 0.9
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 3
    for figure in figures:
        assert base64.b64decode(figure).startswith(b"\x89PNG")
