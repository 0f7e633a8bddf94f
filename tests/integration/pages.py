"""The page of a tiny model in a process of its own, for tests that drive it."""

import os
import re
import signal
import subprocess
import sys
import time

from unit.serving_tiny import ascii_tiny

PATIENCE = 180  # seconds, on a machine that is busy
# Every question is longer than what is kept exact.
DOCUMENT = "This is a sentence of some length, and there are more of its kind. " * 14


class RunningPage:
    """A page that `nexusquant-cache app` shows.

    Args:
        place: A folder for the model and the log.
        options: More options of the command.
        browser: A program that is called with the address of the page, with the option ``--browser``.
    """

    def __init__(self, place, *options, browser=""):
        self.log, self.uploads, folder = place / "log", place / "uploads", place / "tiny"
        ascii_tiny().model.save_pretrained(folder)
        ascii_tiny().tokenizer.save_pretrained(folder)
        command = [sys.executable, "-c", "from nexusquant_cache.cli import main; main()", "app", str(folder)]
        options = ("--port=0", "--preset=keep-all", "--answer-tokens=24", *options)
        environment = os.environ | {"BROWSER": str(browser), "GRADIO_TEMP_DIR": str(self.uploads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)  # noqa: S603
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r"running on (http://\S+)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.url = found[1]

    def stop(self):
        """End the process; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
