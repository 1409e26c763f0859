"""`python -m visionpeft.push RUN user/name`: put what a run has trained on the Hugging Face Hub."""

from visionpeft.runs.command import Options
from visionpeft.sharing.hub import push_to_hub


def push(arguments: list[str]) -> None:
    """Upload adapter or learner with a model card, as the command line says."""
    parser = Options("python -m visionpeft.push", description="Upload a finished run, not its backbone.")
    parser.add_argument("run", help="directory of a finished run, or a folder of an adapter or a learner")
    parser.add_argument("repo_id", help="user/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to which to upload")
    options = parser.parse_args(arguments)
    print(push_to_hub(options.run, options.repo_id, private=options.private, revision=options.revision))
