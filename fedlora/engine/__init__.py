"""Running a strategy over clients: Flower's messages, the rounds, the run's folder, the display."""

from fedlora.engine.central import Central
from fedlora.engine.federation import Federation
from fedlora.engine.folder import SERVER, RunFolder
from fedlora.engine.grid import InProcessGrid
from fedlora.engine.memory import Memory
from fedlora.engine.patience import Patience
from fedlora.engine.progress import Progress, megabytes
from fedlora.engine.roster import Roster
from fedlora.engine.rules import Rules
from fedlora.engine.site import Site

__all__ = [
    "SERVER",
    "Central",
    "Federation",
    "InProcessGrid",
    "Memory",
    "Patience",
    "Progress",
    "Roster",
    "Rules",
    "RunFolder",
    "Site",
    "megabytes",
]
