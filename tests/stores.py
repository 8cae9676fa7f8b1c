"""Servers of object storage on the loopback address: S3 by moto, GCS by gcp-storage-emulator.

    python stores.py s3|gs

prints the environment that its clients need, as JSON on one line, and serves until it is killed.
"""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

BUCKET = "bucket"


def s3() -> dict[str, str]:
    """Start S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).create_bucket(Bucket=BUCKET)
    return environment


def gs() -> dict[str, str]:
    """Start GCS."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).start()
    # Without these gcsfs looks for credentials, and for what only the real one has.
    anonymous = {"FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return anonymous | {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GOOGLE_CLOUD_PROJECT": "test"}


def start(kind: str) -> tuple[subprocess.Popen, dict[str, str]]:
    """A server in a process of its own, and the environment of its clients."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__)), kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return server, json.loads(server.stdout.readline())


if __name__ == "__main__":
    print(json.dumps({"s3": s3, "gs": gs}[sys.argv[1]]()), flush=True)
    threading.Event().wait()
