"""Alembic's entry: runs the migrations on the connection that `millpond.hub.db.migrate` gives."""

from alembic import context

from millpond.hub.db import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
