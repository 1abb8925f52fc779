package containerd_suite

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// TestSuite is containerd's suite. Its name must be overlayfs: else one test expects folders of lower layers to be
// renamed, which an overlay mount cannot do.
func TestSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := startServer(root)
		if err != nil {
			return nil, nil, err
		}
		return s.client, s.stop, nil
	})
}
