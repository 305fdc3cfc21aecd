"""How good the master is (`routes`) and what models did on recorded questions (`outcomes`, `assign`); `report` shows and writes it."""
