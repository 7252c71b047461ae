"""Day two of the appliance: backup, restore, upgrade, rotation, bundles, diagnosis. Standard library only."""
