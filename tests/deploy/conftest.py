"""The command in this process, folders of deployments, and the worker of a site."""

from command_lab import isolated, refused
from deployment_lab import deployment, folder, local_deployment
from site_lab import ask, composed, model, site
