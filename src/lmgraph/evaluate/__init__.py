"""How good the master is: `routes` asks it and measures, `report` shows and writes what was measured."""
