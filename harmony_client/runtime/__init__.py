"""What a recipe is given, and its job."""

from harmony_client.runtime.context import *
from harmony_client.runtime.data import *
from harmony_client.runtime.decorators import *
from harmony_client.runtime.dto import *
from harmony_client.runtime.job_notifiers import *
from harmony_client.runtime.simple_notifier import *
