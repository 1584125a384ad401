"""``lorasmith push PATH URL``: an adapter or a fleet to a store or to the hub."""

from __future__ import annotations

from rich.console import Console

from lorasmith.cli.output import Common, CommonOptions, emit, grid, session, stderr

__all__ = ["push"]


def push(
    path: str,
    url: str,
    *,
    overwrite: bool = False,
    extras: bool = True,
    card: bool = True,
    private: bool = True,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Upload an adapter, a compressed fleet or a directory of adapters.

    Readers see the old files or the new ones, never some of both. Credentials are those of the
    environment: AWS_…, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN or hf auth login.

    Parameters
    ----------
    path
        Directory, hub id or URL.
    url
        s3://bucket/name, gs://…, file:///…, any other URL that fsspec can write, or
        hf://owner/name[@branch][/folder].
    overwrite
        Replace the adapter or fleet that is there.
    extras
        Upload the other files at the top of the directory, too; never pickles, hidden files and
        subdirectories.
    card
        Generate a README.md where there is none.
    private
        Make a new repository of the hub private.
    """
    with session(common):
        import lorasmith as ls
        from lorasmith.progress import bar

        with bar(stderr(), shown=not common.quiet, unit="bytes") as progress:
            made = ls.push(
                path,
                url,
                overwrite=overwrite,
                extras=extras,
                card=card,
                private=private,
                progress=progress,
            )

        def render(console: Console) -> None:
            console.print(
                grid(
                    {
                        "at": made.url,
                        "kind": made.kind,
                        "files": ", ".join(made.files),
                        "size": f"{made.nbytes / 1e6:,.3g} MB",
                        "replaced": "an older one" if made.replaced else None,
                        "removed": ", ".join(made.removed) or None,
                        "left out": ", ".join(made.left_out) or None,
                        "commit": made.commit,
                        "time": f"{made.seconds:.1f} s",
                    }
                )
            )

        emit(common, made.to_dict(), render)
    return 0
