"""Corrections and their reviews, training jobs, promotions, edges."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "corrections",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("content", sa.String(length=64), nullable=False),
        sa.Column("edge", sa.String(length=128), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("text_key", sa.String(length=64), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("label", sa.String(length=200), nullable=False),
        sa.Column("predicted", sa.String(length=200), nullable=True),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("model", sa.JSON(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created", sa.String(length=64), nullable=False),
        sa.Column("received", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("final_label", sa.String(length=200), nullable=True),
        sa.Column("reviewer", sa.String(length=200), nullable=True),
        sa.Column("reviewed", sa.Double(), nullable=True),
        sa.Column("review", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_corrections")),
        sa.UniqueConstraint("id", name=op.f("uq_corrections_id")),
    )
    op.create_index(op.f("ix_corrections_state_review"), "corrections", ["state", "review"], unique=False)
    op.create_index(
        op.f("ix_corrections_state_text_key_edge"), "corrections", ["state", "text_key", "edge"], unique=False
    )
    op.create_index(op.f("ix_corrections_edge_state"), "corrections", ["edge", "state"], unique=False)
    op.create_table(
        "edges",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("first_seen", sa.Double(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_edges")),
    )
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("started", sa.Double(), nullable=True),
        sa.Column("finished", sa.Double(), nullable=True),
        sa.Column("version", sa.String(length=16), nullable=True),
        sa.Column("champion", sa.String(length=80), nullable=True),
        sa.Column("training_rows", sa.Integer(), nullable=True),
        sa.Column("heldout_rows", sa.Integer(), nullable=True),
        sa.Column("review", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_state"), "jobs", ["state"], unique=False)
    op.create_table(
        "promotions",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("job", sa.Integer(), nullable=True),
        sa.Column("promoted", sa.Boolean(), nullable=False),
        sa.Column("applied", sa.Boolean(), nullable=False),
        sa.Column("digest", sa.String(length=80), nullable=False),
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("champion", sa.String(length=80), nullable=True),
        sa.Column("champion_version", sa.String(length=16), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=True),
        sa.Column("verdict", sa.JSON(), nullable=False),
        sa.Column("by", sa.String(length=200), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["jobs.number"], name=op.f("fk_promotions_job")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_promotions")),
        sa.UniqueConstraint("job", name=op.f("uq_promotions_job")),
    )
    op.create_index(op.f("ix_promotions_applied"), "promotions", ["applied"], unique=False)
    op.create_table(
        "reviews",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("correction", sa.Integer(), nullable=False),
        sa.Column("decision", sa.String(length=16), nullable=False),
        sa.Column("label", sa.String(length=200), nullable=True),
        sa.Column("reviewer", sa.String(length=200), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["correction"], ["corrections.number"], name=op.f("fk_reviews_correction")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_reviews")),
    )
    op.create_index(op.f("ix_reviews_correction"), "reviews", ["correction"], unique=False)
