"""What every route can reach: `Services` lives in the application's state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from gateway.catalog import Catalog
from gateway.delivery import Delivery
from gateway.inputs import Inputs
from gateway.jobs.runner import JobRunner
from gateway.jobs.webhooks import Webhooks
from gateway.limits import Admission
from gateway.metrics import Metrics
from gateway.probe import Probe
from gateway.variants import Variants
from runtime.config import Config


@dataclass(frozen=True)
class Services:
    """Made once by `gateway.app.create_app`."""

    config: Config
    catalog: Catalog
    runner: JobRunner
    admission: Admission
    webhooks: Webhooks
    delivery: Delivery
    inputs: Inputs
    metrics: Metrics
    variants: Variants
    probe: Probe = field(default_factory=Probe)
    started: float = field(default_factory=time.monotonic)


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Here = Annotated[Services, Depends(services)]
"""The parameter of a route."""
