"""Package metadata and layout. The tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "xlmr/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
TRITON = "triton>=3.6,<3.10; sys_platform == 'linux'"
TEST = [
    "accelerate",
    "babel",
    "hypothesis",
    "matplotlib",
    "packaging",
    "peft",
    "pytest>=8",
    "sentence-transformers>=6",
    "setuptools>=77.0.3",
    "transformers>=5.3",
    TRITON,
]

setup(
    name="xlmr",
    version=VERSION.group(1),
    description="XLM-RoBERTa, a fast drop-in for transformers' classes",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
    ],
    python_requires=">=3.10",
    # kernels/ stands at the top level but is installed as xlmr.kernels: Hugging Face's package `kernels` is imported by
    # transformers whenever it can be found, so a second importable `kernels` would break one of the two.
    #   1. package_dir puts the files of kernels/ into xlmr/kernels/ of every wheel, on systems without symlinks too;
    #   2. the symlink xlmr/kernels -> ../kernels does the same for imports straight from a source tree;
    #   3. kernels/ has no __init__.py: as a namespace folder it never outranks the real `kernels` package.
    package_dir={"xlmr": "xlmr", "xlmr.kernels": "kernels"},
    packages=["xlmr", "xlmr.demo", "xlmr.kernels", "xlmr.pipelines"],
    package_data={"xlmr": ["py.typed"], "xlmr.demo": ["*.json", "*.md", "*.tsv", "checkpoint/*", "checkpoint/*/*"]},
    install_requires=["numpy", "safetensors>=0.4.3", "sentencepiece>=0.2", "torch>=2.10", "tqdm"],
    extras_require={
        "hub": ["huggingface_hub>=0.24"],
        "triton": [TRITON],
        "test": TEST,
        "bench": [*TEST, "pytest-benchmark>=5"],  # a round on a GPU begins with the tests
        "peers": ["ctranslate2", "onnx", "onnxruntime", "onnxscript"],  # beside "bench": other runtimes
    },
    entry_points={"console_scripts": ["xlmr = xlmr.__main__:main"]},
)
