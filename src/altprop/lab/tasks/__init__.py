"""What a comparison learns, by name; `supervised.py` is for a model and data of your own."""

from altprop.lab.tasks.digits import Digits as Digits
from altprop.lab.tasks.fashion import Fashion as Fashion
from altprop.lab.tasks.mnist5k import Mnist5k as Mnist5k
from altprop.lab.tasks.parity import Parity as Parity
from altprop.lab.tasks.skew import Skew as Skew
from altprop.lab.tasks.task import AbstractTask as AbstractTask
from altprop.lab.tasks.teacher import Teacher as Teacher
from altprop.lab.tasks.text import Text as Text
