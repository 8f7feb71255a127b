"""What a checkout needs before anything is installed. Never imported by the product."""
