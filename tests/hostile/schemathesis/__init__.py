"""What schemathesis is told of our page: its configuration, and what a schema cannot say."""
