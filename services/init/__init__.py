"""What the appliance needs made once: secrets, a certificate, nginx's configuration, folders' owners."""
