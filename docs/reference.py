"""What the documentation says of the configuration, from the code: keys, defaults, what is allowed, and comments."""

import inspect
import re

from jaxdtp.configuration import config
from jaxdtp.configuration.allowed import RULES


def meanings() -> dict[str, str]:
    """What the comments of `default_config` say of each key."""
    found, above = {}, []
    for line in inspect.getsource(config.default_config).splitlines():
        if comment := re.fullmatch(r"\s*# (.*)", line):
            above.append(comment[1])
            continue
        if key := re.match(r"\s*config\.([\w.]+) = [^#]*(?:# (.*))?$", line):
            found[key[1]] = " ".join([*above, *filter(None, [key[2]])])
        above = []
    return found


def configuration() -> str:
    """A table in Markdown: a row for each key."""
    defaults = config.default_config()
    del defaults.when
    of_keys = meanings()
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key, value in sorted(config.flatten(defaults).items()):
        allowed = RULES[key].allowed.replace("|", r"\|")
        lines.append(f"| `{key}` | `{value!r}` | {allowed} | {of_keys[key]} |")
    return "\n".join(lines) + "\n"
