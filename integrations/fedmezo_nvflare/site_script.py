"""The program that NVFlare starts at each site for a job, below the site's workspace."""

from pathlib import Path

from fedmezo_nvflare.site import main

if __name__ == "__main__":
    main(Path.cwd())
