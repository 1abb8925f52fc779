//! Many callers at once.

use std::sync::Arc;

use tonic::Code;

use super::{KindCode, Served, folders, kind};

const CALLERS: usize = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_callers_at_once_get_each_their_own() {
    let served = Arc::new(Served::start().await);
    served.layer("base", "").await;
    let mut tasks = Vec::new();
    for caller in 0..CALLERS {
        let served = served.clone();
        tasks.push(tokio::spawn(async move {
            for round in 0..3 {
                let (key, name) = (format!("k {caller} {round}"), format!("n {caller} {round}"));
                let mounts = served.prepare(&key, "base", &[]).await.unwrap();
                assert_eq!(served.mounts(&key).await.unwrap(), mounts);
                served.usage(&key).await.unwrap();
                served.commit(&name, &key, "", &[]).await.unwrap();
                assert_eq!(kind(&served.stat(&name).await.unwrap()), KindCode::Committed);
                assert!(served.list(&[]).await.unwrap().iter().any(|info| info.name == name));
                served.view(&key, &name).await.unwrap();
                served.remove(&key).await.unwrap();
                if round < 2 {
                    served.remove(&name).await.unwrap();
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(served.list(&[]).await.unwrap().len(), CALLERS + 1);
    assert_eq!(folders(&served.root()).len(), CALLERS + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_callers_with_one_key_one_succeeds() {
    let served = Arc::new(Served::start().await);
    served.layer("base", "").await;
    let mut tasks = Vec::new();
    for _ in 0..CALLERS {
        let served = served.clone();
        tasks.push(tokio::spawn(async move {
            let prepared = served.prepare("k", "base", &[]).await.err().map(|error| error.code());
            let committed = served.commit("n", "k", "", &[]).await.err().map(|error| error.code());
            (prepared, committed)
        }));
    }
    let (mut prepared, mut committed) = (0, 0);
    for task in tasks {
        let (prepare, commit) = task.await.unwrap();
        assert!(matches!(prepare, None | Some(Code::AlreadyExists)), "{prepare:?}");
        prepared += usize::from(prepare.is_none());
        assert!(matches!(commit, None | Some(Code::AlreadyExists | Code::NotFound)), "{commit:?}");
        committed += usize::from(commit.is_none());
    }
    assert_eq!(committed, 1);
    // The key is free again after the commit.
    let left = usize::from(served.stat("k").await.is_ok());
    assert_eq!(prepared, committed + left);
    assert_eq!(folders(&served.root()).len(), 2 + left);
}
