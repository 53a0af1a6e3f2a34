package run

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
)

// Beside runs main with services beside it, and returns when all have ended. The services outlive
// ctx: they go on while main drains and are stopped when it has returned. A service that fails ends
// main's context with its error.
func Beside(ctx context.Context, main func(context.Context) error, services ...func(context.Context) error) error {
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	outliving, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	var group errgroup.Group
	for _, service := range services {
		group.Go(func() error {
			err := service(outliving)
			if err != nil && outliving.Err() == nil {
				abort(err)
				return err
			}
			return nil
		})
	}
	err := main(ctx)
	stop(nil)
	if failed := group.Wait(); failed != nil && !errors.Is(err, failed) {
		err = errors.Join(err, failed)
	}
	return err
}
