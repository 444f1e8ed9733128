"""Packaging for mits_nb: every fact comes from settings.ini, so that there is one place to change it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
newest = 14
oldest = int(cfg["min_python"].split(".")[1])
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=LICENSES[cfg["license"]],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Education",
        f"Natural Language :: {cfg['language']}",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest, newest + 1)],
    ],
    packages=[*find_packages(include=["mits_nb", "mits_nb.*"]), "mits_nb.data_manifests"],
    package_dir={"mits_nb.data_manifests": "data_manifests"},
    package_data={"mits_nb": ["weights/**/*"], "mits_nb.data_manifests": ["*.json"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "docs", "decoders", "idc", "tensorboard", "voila")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["mits_nb=mits_nb._modidx:d"]},
    zip_safe=False,
)
