"""What the appliance is made of, and what is known against it."""
