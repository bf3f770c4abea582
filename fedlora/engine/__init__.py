"""Running a strategy over clients: Flower's messages, the rounds, the run's folder, the display."""

from flwr.serverapp import Grid

from fedlora.engine.central import Central
from fedlora.engine.federation import Federation
from fedlora.engine.folder import SERVER, RunFolder
from fedlora.engine.grid import InProcessGrid
from fedlora.engine.memory import Memory, Shelf
from fedlora.engine.patience import Patience
from fedlora.engine.progress import Display, Progress, megabytes
from fedlora.engine.roster import Roster
from fedlora.engine.rules import Rules
from fedlora.engine.simulated import Simulated, simulation
from fedlora.engine.site import Site
from fedlora.engine.told import Listener, Teller

__all__ = [
    "SERVER",
    "Central",
    "Display",
    "Federation",
    "Grid",
    "InProcessGrid",
    "Listener",
    "Memory",
    "Patience",
    "Progress",
    "Roster",
    "Rules",
    "RunFolder",
    "Shelf",
    "Simulated",
    "Site",
    "Teller",
    "megabytes",
    "simulation",
]
