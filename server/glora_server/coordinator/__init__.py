"""The use cases: what devices and operators ask for, and the engine that moves rounds forward."""
