"""From what a spec names to folders on this machine: adapters that are fetched from a hub, bases that adapters name."""
