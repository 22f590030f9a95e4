"""setuptools' build backend, with the torch of the environment that runs pip.

An extension works with the torch it was compiled against. pip builds in an isolated environment, where
it would install the newest torch, which need not be the one that runs. So when the environment that
runs pip has a torch, the isolated build imports that one and downloads none.
"""

import subprocess
import sys
from functools import cache

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

_TORCH = "torch>=2.7"


@cache
def _site_of_installed_torch():
    """The folder from which this interpreter, outside of pip's isolation (-E), imports torch, or ''."""
    find = (
        "import importlib.util as u, pathlib as p; s = u.find_spec('torch');"
        "print(p.Path(s.origin).parents[1] if s and s.origin else '')"
    )
    found = subprocess.run([sys.executable, "-E", "-c", find], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _use_installed_torch():
    site = _site_of_installed_torch()
    if site and site not in sys.path:
        sys.path.append(site)  # behind the isolated environment's own packages


def _requirements(setuptools_hook, config_settings):
    return setuptools_hook(config_settings) + ([] if _site_of_installed_torch() else [_TORCH])


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
