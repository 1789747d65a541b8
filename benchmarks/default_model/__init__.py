"""How the model that ships inside the package is made: `convert`, then `heal`."""
