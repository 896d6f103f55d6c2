"""How a route comes by the controller's parts. Touches the application's state only."""

from typing import Annotated

from fastapi import Depends, Request

from holdfast_controller.control import Control


async def _control(request: Request) -> Control:
    # A coroutine: anything else would be called in a thread, in every request.
    control = request.app.state.control
    assert isinstance(control, Control), "this application was made for its OpenAPI only"
    return control


TheControl = Annotated[Control, Depends(_control)]
