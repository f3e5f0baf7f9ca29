"""The Python SDK of framemesh: a local mesh (`Generator`) or a running server (`Client`).

from framemesh import Generator

with Generator.from_pretrained("demo", num_gpus=2) as generator:
    result = generator.generate("a red circle moving right", seed=1)
"""

from gateway.mesh import Frames
from launch.client import Client
from launch.generator import Generator, Result
from runtime.errors import FramemeshError, InvalidInput, RequestFailed, StartFailed
from runtime.protocol import Completed, Progress
from runtime.sampling import SamplingParams

__all__ = [
    "Client",
    "Completed",
    "FramemeshError",
    "Frames",
    "Generator",
    "InvalidInput",
    "Progress",
    "RequestFailed",
    "Result",
    "SamplingParams",
    "StartFailed",
]
