"""The same floods against no guard, rstguard, and what else an administrator might put there."""
